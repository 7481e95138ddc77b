"""Folding is done in full fp32."""

import torch
from torch import Tensor, nn

from lightning_peft.core.folding import Folding
from lightning_peft.core.graft import attach


class Plus(Folding):
    """Adds one, and notes how precise products are meanwhile."""

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        self.seen = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        return value + 1


def test_products_are_exact_while_an_update_is_folded_in() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        host = nn.Linear(2, 2)
        graft = attach(host, Plus(), "plus")
        graft.merge(host)
        assert graft.seen == ("ieee", "ieee")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
