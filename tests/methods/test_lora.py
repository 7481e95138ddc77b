from lightning_peft import LoRA
from tests.contract import MethodContract
from tests.models import KINDS


class TestLoRA(MethodContract):
    method = LoRA(r=2)
    backbones = KINDS

    def count(self, kind):
        return 0
