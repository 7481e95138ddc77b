"""Pixel prompts: a trained frame of pixels around the image; all of the model is frozen.

``around``: the image grows to ``[top; left x right; bottom]``, p pixels on each side, which suits a ConvNet, whose
features have no fixed number of places. ``over``: the frame is added to the outermost p pixels of the image, whose size
stays, so that it suits any model, CLIP's image side among them.

Source: ``around``: Jia et al. 2022, arXiv 2203.12119, the experiments with ConvNets, and the location ``pad`` of the
authors' code (``src/models/resnet.py``), where pixels are kept as U(0, 1) and normed like an image in each step; here
they start from the normed values and are trained as these, which is a learning rate of its own for each channel.
``over``: Bahng et al. 2022, arXiv 2203.17274, section 3.2, and their code, whose frame starts from N(0, 1).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.arguments import choice, natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.image_structure import stated_image_size
from lightning_peft.core.meta_run import ran
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import DIGITS, Rates
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Frame(Graft):
    """Puts a frame of pixels around an image, or adds it. Its host is the convolution that reads the pixels.

    Args:
        ends: the pixels above and below, [C, 2 p, W'].
        sides: those on the left and on the right, [C, H', 2 p].
        form: 'around' or 'over'.
    """

    def __init__(self, ends: nn.Parameter, sides: nn.Parameter, form: Literal["around", "over"]) -> None:
        super().__init__()
        self.ends = ends
        self.sides = sides
        self.form = form

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return the images with the frame, [B, C, H + 2 p, W + 2 p] or [B, C, H, W].

        Raises:
            TuningError: they are of another size than the frame.
        """
        width, (above, below) = self.ends.shape[1] // 2, self.ends.to(x.dtype).chunk(2, dim=1)
        left, right = self.sides.to(x.dtype).chunk(2, dim=2)
        grown = 2 * width if self.form == "around" else 0
        size = (left.shape[1] + 2 * width - grown, above.shape[2] - grown)
        if x.ndim != 4 or tuple(x.shape[-2:]) != size:
            raise TuningError(
                f"an image of {tuple(x.shape[-2:])} pixels does not fit the frame, which is for {size}: "
                "let image_size be the size of the images."
            )
        if self.form == "over":
            inside = x.new_zeros(x.shape[1], left.shape[1], x.shape[3] - 2 * width)
            return x + torch.cat([above, torch.cat([left, inside, right], dim=2), below], dim=1)
        above, below, left, right = (part.expand(len(x), -1, -1, -1) for part in (above, below, left, right))
        return torch.cat([above, torch.cat([left, x, right], dim=3), below], dim=2)


@dataclass(eq=False, kw_only=True)
class PixelPrompt(Method):
    """Train a frame of pixels around the image.

    Args:
        pixels: width p of the frame [pixels].
        form: 'around' makes the image larger; 'over' adds the frame to its outermost pixels.
        image_size: height and width of the images that the model is given [pixels]; None: what its configuration says,
            224 if it says nothing.
        init: 'uniform', colours as those of images, normed by the mean and the deviation of ImageNet; or 'normal'.
            None: what the authors of the form draw from, 'uniform' around and 'normal' over.
    """

    pixels: int = natural(5, "is no frame")
    form: Literal["around", "over"] = choice("around", "is no place of a frame")
    image_size: int | None = natural(None, "is no size of an image")
    init: Literal["uniform", "normal"] | None = choice(None, "is no initial value of a pixel")

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "a frame of pixels around the image"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv 2203.12119"
    advised: ClassVar[Rates] = Rates(2e-2, 1e-1, DIGITS)

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the frame to the convolution that reads the pixels."""
        stem = _stem(backbone)
        height, width = self._size(backbone)
        p = self.pixels
        if self.form == "around":
            ends, sides = (2 * p, width + 2 * p), (height, 2 * p)
        elif min(height, width) <= 2 * p:
            raise TuningError(
                f"pixels={p} covers all of an image of {height} by {width}: "
                f"take {(min(height, width) - 1) // 2} or less."
            )
        else:
            ends, sides = (2 * p, width), (height - 2 * p, 2 * p)
        attach(stem, Frame(self._drawn(stem, ends), self._drawn(stem, sides), self.form), self.key)
        image = torch.empty(2, stem.in_channels, height, width, dtype=stem.weight.dtype, device="meta")
        if self.form == "around" and not ran(backbone, image):
            raise TuningError(
                f"{type(backbone).__name__} takes images of one size alone: take form='over', or VPT, whose prompts "
                "are tokens."
            )
        return ()

    def _size(self, backbone: nn.Module) -> tuple[int, int]:
        if self.image_size is not None:
            return self.image_size, self.image_size
        return stated_image_size(backbone) or (224, 224)

    def _drawn(self, stem: nn.Conv2d, shape: tuple[int, int]) -> nn.Parameter:
        pixels = torch.empty(stem.in_channels, *shape, device=device_of(stem))
        if (self.init or ("uniform" if self.form == "around" else "normal")) == "normal":
            return nn.Parameter(pixels.normal_())
        mean, std = (torch.tensor(one, device=pixels.device) for one in (IMAGENET_MEAN, IMAGENET_STD))
        if stem.in_channels != len(mean):  # of other channels these are the means over colours
            mean, std = (one.mean().expand(stem.in_channels) for one in (mean, std))
        return nn.Parameter((pixels.uniform_() - mean[:, None, None]) / std[:, None, None])


def _stem(backbone: nn.Module) -> nn.Conv2d:
    found = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    if found is None:
        raise TuningError(
            f"{type(backbone).__name__} has no convolution that reads the pixels of an image: tune it by LoRA."
        )
    return found


PixelPromptMixin = TunedBy[PixelPrompt]
