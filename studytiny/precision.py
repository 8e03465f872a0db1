"""In which numbers a model computes its replies: float32, half precision, or whole numbers of 8 bits.

Writing one character reads every weight once, so it takes as long as the weights take to come from memory: half the
bytes, half the time. On a CPU the small remaining part (norms, attention, the stream itself) stays in float32, which
costs little and keeps the result close.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studytiny.checkpoint import Model
from studytiny.errors import UserError
from studytiny.kernel import build_kernel

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(wanted: str, model: Model) -> str:
    """``auto`` made definite: the fastest one that this device can do and that does not change what the model says.

    Raises:
        UserError: a name not in ``PRECISIONS``, or one that this device cannot do.
    """
    if wanted not in PRECISIONS:
        raise UserError(f"不认识的精度 {wanted!r}；可以用 {'、'.join(PRECISIONS)}。")
    device = model.device.type
    if wanted == "auto":
        if device == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        if device == "mps":
            return "float16"
        # StudyTinyModel is served exactly as published: it is there to be compared with.
        return "int8" if model.architecture == "studytiny" and int8_works(model) else "float32"
    if device == "cpu" and wanted == "float16":
        raise UserError("CPU 上没有 float16 的运算；请用 bfloat16、int8 或 float32。")
    if wanted == "int8" and not int8_works(model):
        raise UserError(f"这台设备（{device}）上没有 int8 的运算；请用 float32 或 auto。")
    return wanted


def in_precision(model: Model, precision: str) -> Model:
    """``model`` computing in ``precision``: a copy, except where it does so already. The caller's is left as it is."""
    device = model.device.type
    if precision == "float32" or (precision in _HALF and device != "cpu"):
        dtype = _HALF.get(precision, torch.float32)
        same = all(parameter.dtype == dtype for parameter in model.parameters())
        return model if same else copy.deepcopy(model).to(dtype)
    made = copy.deepcopy(model).float()
    convert = Int8Linear if precision == "int8" else HalfLinear
    if made.architecture == "studytiny":
        # Methods make way for layers: matrices that read the same x become one, and the output matrix, which is the
        # embedding itself, gets a layer of its own.
        for block in made.layers:
            attention, mlp = block.self_attn, block.mlp
            _join(attention, ("q_proj", "k_proj", "v_proj"), convert)
            _join(mlp, ("gate_proj", "up_proj"), convert)
        made.__dict__["unembed"] = convert(made.embed_tokens.weight.detach(), None)
    for module in list(made.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, convert(child.weight.detach(), child.bias))
    return made


def _join(part: nn.Module, names: Sequence[str], convert: type[nn.Module]) -> None:
    """Makes one layer of several of ``part``, whose ``project`` gives the results of each."""
    weights = [part._modules.pop(name).weight.detach() for name in names]
    joined = convert(torch.cat(weights), None)
    part.__dict__["project"] = lambda x: joined(x).split([len(weight) for weight in weights], dim=-1)


class HalfLinear(nn.Module):
    """x W^T + b with W and the product in bfloat16, x and the result in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)  # (N, K)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x.bfloat16(), self.weight).float()
        return product if self.bias is None else product + self.bias


class Int8Linear(nn.Module):
    """x W^T + b multiplied in whole numbers from -127 to 127.

    Every row of W has a scale of its own, found once, and every row of x one that is found each time; the sums are
    exact whole numbers (vector-wise quantization: LLM.int8(), Dettmers et al. 2022). So no row of x touches another.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rounded, scale = round_rows(weight)
        self.register_buffer("weight", rounded)  # (N, K) int8
        self.register_buffer("scale", scale.squeeze(-1))  # (N,)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = round_rows(x)
        sums = torch._int_mm(rounded.flatten(0, -2), self.weight.t()).view(*x.shape[:-1], -1)  # (..., N) int32
        product = sums.float().mul_(scale).mul_(self.scale)
        return product if self.bias is None else product.add_(self.bias)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) float32 -> (..., K) int8 and (..., 1) float32, whose product is nearly x; each row's largest is 127."""
    scale = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_min_(1e-30).div_(127)
    return (x / scale).round_().to(torch.int8), scale


def int8_works(model: Model) -> bool:
    """Whether int8 is fast here: by our own kernel, or by PyTorch on x86 with oneDNN (else it goes entry by entry)."""
    if model.device.type != "cpu":
        return False
    if model.architecture == "studytiny" and build_kernel() is not None:
        return True
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
