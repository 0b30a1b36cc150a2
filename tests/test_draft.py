"""What every draft keeps of a request's tokens."""

import torch

from specx.draft import TokenIds


def test_token_ids():
    ids = TokenIds(torch.device("cpu"))
    assert len(ids) == 0
    assert ids.all().dtype == torch.long
    ids.start(torch.tensor([5, 6, 7]))
    ids.append([8])
    ids.append((9, 10))
    assert len(ids) == 6
    assert ids.newest == 10
    first = ids.all()
    assert first.tolist() == [5, 6, 7, 8, 9, 10]
    assert ids.all() is first, "nothing new, nothing copied"
    ids.append([11])
    assert first.tolist() == [5, 6, 7, 8, 9, 10], "what was given out stays"
    assert ids.all().tolist()[-1] == 11
    ids.append([12])
    ids.start(torch.tensor([1]))
    assert ids.all().tolist() == [1]
