"""TinyTL: the biases are trained, and a lite residual beside each block, ``y = F(x) + Up(LR(x))``.

``LR = norm(conv1x1(ReLU(norm(conv_kxk(AvgPool2(x))))))``, at half the resolution and with two groups, Up bilinear. The
last norm starts at zero, so that training starts at the frozen model, the convolutions from N(0, 2 / (k^2 C_out)). The
norms are GroupNorms of 8 channels a group, the convolutions have standardised weights: no statistics of a batch.

Source: Cai et al. 2020, arXiv 2007.11622, section 3; code: mit-han-lab/tinyml, ``tinytl/``. There the backbone's own
BatchNorms are replaced by GroupNorms and its frozen weights quantised; here the backbone stays as it is, its BatchNorms
in eval mode. In blocks of tokens (ViT) the tokens of the image are the grid, other tokens get nothing, so that the
residual of the last block matters only to a head that reads the image's tokens. Biases have no weight decay.

The paper's memory model counts the input of a layer only where its weight is trained, and one bit for a ReLU; autograd
in PyTorch also keeps the inputs of GELU, softmax and norms: ``activation_memory_mib`` is what it keeps in a first step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import anatomy, compatibility, image_structure, select, sharded, structure, sublayers
from lightning_peft.core.arguments import natural, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft, attach, detach
from lightning_peft.core.placement import device_of
from lightning_peft.core.private_torch import is_compiled
from lightning_peft.core.rates import DIGITS, Rates
from lightning_peft.core.reach import reached
from lightning_peft.features.activation_memory import Kept, tensors_in
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

_EPS = 1e-5


class Shapes(Graft):
    """Notes the shapes of the first input and of the output of its host."""

    seen: tuple[torch.Size, torch.Size] | None = None

    def after(self, out: Any, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output as it is."""
        first = out if isinstance(out, Tensor) else out[0]
        self.seen = x.shape, first.shape
        return out


class LiteResidual(Graft):
    """Adds ``Up(LR(x))`` to the output of a block.

    Args:
        into: shape of the block's input, [B, C, H, W] or [B, T, C].
        out: shape of its output.
        grid: rows and columns of the image among the tokens; None: the block has images.
        kernel: size of the first convolution at most.
        groups: its groups.
        expand: channels between the convolutions, as a multiple of those of the input.
        device: where to put it.
    """

    def __init__(
        self,
        into: torch.Size,
        out: torch.Size,
        grid: tuple[int, int] | None,
        kernel: int,
        groups: int,
        expand: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.grid = grid
        channels, outputs = (into[1], out[1]) if grid is None else (into[2], out[2])
        height, width = (into[2], into[3]) if grid is None else grid
        self.stride = 1 if grid is not None else max(1, into[2] // out[2])
        self.pooled = (max(1, height // 2), max(1, width // 2))
        size = min(kernel, *self.pooled)
        size -= 1 - size % 2
        middle = max(8, round(channels * expand / 8) * 8)
        self.groups = groups if channels % groups == 0 and middle % groups == 0 else 1
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        options: dict[str, Any] = {"stride": self.stride, "padding": size // 2, "groups": self.groups, "bias": False}
        self.conv = nn.Conv2d(channels, middle, size, **options, **place)
        self.norm = nn.GroupNorm(_norm_groups(middle), middle, **place)
        self.point = nn.Conv2d(middle, outputs, 1, bias=False, **place)
        self.last_norm = nn.GroupNorm(_norm_groups(outputs), outputs, **place)
        for layer in (self.conv, self.point):  # He's rule by what leaves a layer, whatever its groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)))
        nn.init.zeros_(self.last_norm.weight)

    def after(self, out: Any, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output with the residual added to the tensor, or to the first of a tuple."""
        if not isinstance(out, Tensor):
            return type(out)((self.after(out[0], host, x), *out[1:]))
        if self.grid is None:
            return out + self.residual(x, out.shape[2:]).to(out.dtype)
        height, width = self._grid(x.shape[1])
        others = x.shape[1] - height * width
        image = x[:, others:].transpose(1, 2).unflatten(2, (height, width))
        tokens = self.residual(image, (height, width)).flatten(2).transpose(1, 2)
        return out + F.pad(tokens, (0, 0, others, 0)).to(out.dtype)

    def residual(self, x: Tensor, size: Iterable[int]) -> Tensor:
        """Return ``Up(LR(x))``, [B, C', *size]."""
        size = list(size)
        x = F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else F.adaptive_avg_pool2d(x, 1)
        conv, weight = self.conv, _standardised(self.conv.weight).to(x.dtype)
        x = F.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups)
        x = F.conv2d(F.relu(_normed(self.norm, x)), _standardised(self.point.weight).to(x.dtype))
        x = _normed(self.last_norm, x)
        return x if list(x.shape[2:]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def _grid(self, tokens: int) -> tuple[int, int]:
        assert self.grid is not None
        if tokens >= self.grid[0] * self.grid[1]:
            return self.grid
        raise TuningError(
            f"an image of {tokens} tokens is smaller than the {self.grid[0]} x {self.grid[1]} of TinyTL's residuals: "
            "build it with that image_size."
        )


@dataclass(eq=False, kw_only=True)
class TinyTL(Method):
    """Train the biases and lite residuals beside the blocks of an image model.

    Args:
        kernel_size: size of the residual's first convolution at most; it is no larger than what it sees.
        groups: groups of that convolution.
        expand: channels between its convolutions, as a multiple of those of the block's input.
        biases: train the biases too.
        target_modules: the blocks, as suffixes or one regex; None: the entries of the model's lists of blocks.
        image_size: height and width of the images [pixels]; None: that of the backbone's configuration, or 224.
    """

    kernel_size: int = natural(5)
    groups: int = natural(2)
    expand: float = positive(1.0)
    biases: bool = True
    target_modules: list[str] | str | None = None
    image_size: int | None = natural(None)

    kind: ClassVar[str] = "modules"
    trains: ClassVar[str] = "the biases, and small convolutions beside the blocks of an image model"
    paper: ClassVar[str] = "Cai et al. 2020, arXiv 2007.11622"
    advised: ClassVar[Rates] = Rates(3e-2, 3e-2, f"{DIGITS}; the authors' scripts have 5e-5 to 1.6e-3")
    needs: ClassVar[frozenset[str]] = frozenset({compatibility.GRADIENTS, compatibility.LENGTH})

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach a residual to each block; return the names of the biases."""
        if structure.main_input_of(backbone) not in (None, "pixel_values"):
            raise TuningError(
                f"{type(backbone).__name__} takes no images, and TinyTL's residuals are convolutions: use Adapter."
            )
        biases = reached(backbone, anatomy.bias_owners(backbone).values())
        if self.biases and not biases:
            raise TuningError(
                f"{type(backbone).__name__} has no biases to train: leave them out with biases=False, or use LoRA."
            )
        blocks = self._blocks(backbone)
        for name, (into, out) in self._shapes(backbone, blocks).items():
            grid = None if len(into) == 4 else self._grid(backbone, into[1])
            how = (self.kernel_size, self.groups, self.expand, device_of(blocks[name]))
            attach(blocks[name], LiteResidual(into, out, grid, *how), self.key)
        return biases if self.biases else ()

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Ask for no weight decay of biases and norms, as in the authors' code."""
        parts = name.split(".")
        return {"weight_decay": 0.0} if parts[-1] == "bias" or "norm" in parts or "last_norm" in parts else {}

    def activation_memory(self, model: nn.Module, batch: Mapping[str, Any]) -> int:
        """Return how many bytes a forward pass of ``batch`` keeps for the backward pass, parameters left out."""
        with Kept([*model.parameters(), *model.buffers(), *tensors_in(batch)]) as kept:
            out = model(**batch)
        del out
        return kept.bytes

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to count what the first step saves, but not of sharded weights, of which autograd keeps copies."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        first = trainer.global_step == 0 and batch_idx == 0
        plain = not any(sharded.is_part(parameter) for parameter in pl_module.parameters())
        if first and plain and not any(is_compiled(module) for module in pl_module.modules()):
            self._counting: Kept | None = Kept(
                [*pl_module.parameters(), *pl_module.buffers(), *tensors_in(batch)]
            ).__enter__()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Log it as ``activation_memory_mib``."""
        super().on_before_backward(trainer, pl_module, loss)
        kept = self._end()
        if kept is not None:
            pl_module.log("activation_memory_mib", kept.bytes / 2**20, batch_size=1)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        super().on_exception(trainer, pl_module, exception)
        self._end()

    def _end(self) -> Kept | None:
        kept: Kept | None = vars(self).pop("_counting", None)
        if kept is not None:
            kept.__exit__(None, None, None)
        return kept

    def _blocks(self, backbone: nn.Module) -> dict[str, nn.Module]:
        modules = anatomy.without_grafts(backbone)
        if self.target_modules is None:
            chosen = [name for entries in anatomy.blocks(backbone).values() for name, _ in entries]
        else:
            chosen = []
            for pattern, names in select.match(modules, self.target_modules).items():
                if not names:
                    raise TuningError(
                        f"{pattern!r} matches no module of {type(backbone).__name__}{select.near(pattern, modules)}."
                    )
                chosen += names
        if not chosen:
            raise TuningError(f"{type(backbone).__name__} has no list of blocks: name them with target_modules=.")
        lists = [name for name in chosen if isinstance(modules[name], (nn.ModuleList, nn.ModuleDict))]
        if lists:
            raise TuningError(f"{lists[0]} is no block but a container, which is never called: name what it holds.")
        return self.without_excluded({name: modules[name] for name in chosen})

    def _shapes(self, backbone: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, tuple[torch.Size, torch.Size]]:
        """Return the shapes of each block's input and output, by a pass of one empty image."""
        parameter = next(p for p in backbone.parameters() if p.is_floating_point())
        config = structure.config_of(backbone)
        height, width = self._image_size(backbone) or (224, 224)
        channels = structure.image_channels(config)
        image = torch.zeros(1, channels, height, width, dtype=parameter.dtype, device=parameter.device)
        noted = {name: attach(block, Shapes(), f"{self.key}_shapes") for name, block in blocks.items()}
        try:
            with in_eval(backbone):
                backbone(image)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError, KeyError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise TuningError(
                f"{type(backbone).__name__} does not take an image of {channels} x {height} x {width} ({why}): TinyTL "
                "is for image models; give image_size= if theirs is another."
            ) from None
        finally:
            for block in blocks.values():
                detach(block, f"{self.key}_shapes")
        shapes = {name: seen for name, note in noted.items() if (seen := note.seen) and _fits(blocks[name], *seen)}
        if unlike := [name for name in noted if name not in shapes]:
            raise TuningError(
                f"{unlike[0]} is no block of images [B, C, H, W] or of as many tokens as it is given, or is not used: "
                "leave it out with exclude=."
            )
        return shapes

    def _grid(self, backbone: nn.Module, tokens: int) -> tuple[int, int]:
        """Return the rows and columns of the image among that many tokens."""
        side = math.isqrt(tokens)
        config = structure.config_of(backbone)
        size, patch = self._image_size(backbone), structure.setting(config, "patch_size")
        if size is not None and size[0] == size[1] and isinstance(patch, int) and (size[0] // patch) ** 2 <= tokens:
            per_side = size[0] // patch
            side = per_side if tokens - per_side**2 < 2 * per_side + 1 else side
        return side, side

    def _image_size(self, backbone: nn.Module) -> tuple[int, int] | None:
        return (self.image_size, self.image_size) if self.image_size else image_structure.stated_image_size(backbone)


TinyTLMixin = TunedBy[TinyTL]


def _fits(block: nn.Module, into: torch.Size, out: torch.Size) -> bool:
    """Tell whether a block has images with their channels first, or tokens of which it keeps the number."""
    if len(into) != 4:
        return len(into) == 3 and into[1] == out[1]
    widths = {sublayers.width_of(child) for child in block.children() if isinstance(child, nn.LayerNorm)}
    return into[1] in widths or into[3] not in widths


def _norm_groups(channels: int) -> int:
    return next(groups for groups in range(max(1, channels // 8), 0, -1) if channels % groups == 0)


def _standardised(weight: Tensor) -> Tensor:
    """Return the weights of each output channel with mean 0 and standard deviation 1."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return centred / (centred.std((1, 2, 3), keepdim=True) + _EPS)


def _normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
