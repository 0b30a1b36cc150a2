from specx.cli import main

main(prog_name="specx")
