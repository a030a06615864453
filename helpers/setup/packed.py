"""Linear layers whose weights stay 4-bit integers while the model runs, multiplied by torch's own kernel (tinygemm).

    packed.replace_layers(model)        # layers of GPTQ, AWQ and torchao's int4 become `Int4Linear`

A weight is `(u - 8) * scale + zero`: u an integer from 0 to 15; scale and zero, in bfloat16, shared by a group of
inputs. compressed-tensors keeps q = u - 8 and a zero point z with weight `(q - z) * scale`: zero is `-z * scale`.

transformers 5.17 has no kernel for such checkpoints (quantizers/quantizer_compressed_tensors.py), torchao's class pads
the inputs to 1,024 (torchao/quantization/quantize_/workflows/int4/int4_tile_packed_to_4d_tensor.py). The kernel itself
needs 128: SmolLM2's layers of 576 inputs take 62 % of the memory so.
"""

import functools

import torch
import torch.nn.functional as F

GROUP_SIZES = (32, 64, 128, 256)
CAPABILITY = (8, 0)  # of the GPU
INNER_TILES = 8  # of 16 inputs each, which the kernel reads at a time
INPUTS = 16 * INNER_TILES
OUTPUTS = {"cuda": 8, "cpu": 16}  # a multiple of which the kernel computes
KERNEL = "packed int4, tinygemm (torch._weight_int4pack_mm)"
# The kernel's time grows with the rows; from so many on, unpacking the layer and multiplying in bfloat16 is faster
# (tests/check_gpu.py on an H200: at 128 rows of an 8192 x 2048 layer 153 against 236 us, at 256 rows 302 against 239).
UNPACK_ROWS = 200


def obstacle(group_size: int, device: str, dtype: str) -> str | None:
    """Why the kernel can't multiply here, or None. device: cuda or cpu; dtype: the name of what is computed in.

    torch's kernel for CPUs does not count: in float32 it took 13 times as long as unpacked weights (1536 x 576, one
    row, AVX2), and 80 times at 128 rows."""
    if device != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"it needs compute capability {'.'.join(map(str, CAPABILITY))}"
    if group_size not in GROUP_SIZES:
        return f"it needs a group size of {', '.join(map(str, GROUP_SIZES))}"
    return None if dtype == "bfloat16" else f"it computes in bfloat16, and {dtype} is asked for"


@functools.cache
def _order(device: torch.device) -> torch.Tensor:
    """Where each weight of a tile (8 outputs x 128 inputs, row by row) stands among the tile's 1,024 packed integers.

    torch documents the layout nowhere, so it is read off the operator: a tile that holds the digits of 0 to 1,023."""
    index = torch.arange(8 * INPUTS, device=device)
    digits = [_nibbles(_pack(((index >> shift) & 15).view(8, INPUTS))).view(-1).long() for shift in (0, 4, 8)]
    return torch.argsort(digits[0] + 16 * digits[1] + 256 * digits[2])


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [.., 1024]: the 4-bit integers of each tile, in the order in which they lie in memory."""
    halves = packed.view(torch.uint8)
    return torch.stack((halves & 15, halves >> 4), dim=-1).view(*packed.shape[:2], -1)


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Integers 0 to 15, [outputs, inputs], in the kernel's layout."""
    if values.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), INNER_TILES)
    pairs = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)


class Int4Linear(torch.nn.Linear):
    """A linear layer of 4-bit integers.

    values: int [out, in], 0 to 15. scale, zero: [out, in / group]. Both sizes are padded to what the kernel needs.
    packed: the integers in the kernel's layout; scales_and_zeros: [in / group, out, 2]. unpack_rows: see UNPACK_ROWS.
    """

    def __init__(self, values, scale, zero, bias=None, dtype=torch.bfloat16):
        out_features, in_features = values.shape
        inputs = self._begin(in_features, out_features, in_features // scale.shape[1], bias)
        multiple = OUTPUTS[values.device.type]
        more = (0, inputs - in_features, 0, -(-out_features // multiple) * multiple - out_features)
        groups = (0, more[1] // self.group, 0, more[3])
        both = torch.stack([F.pad(scale, groups), F.pad(zero, groups)], dim=-1).to(dtype)
        self._hold(_pack(F.pad(values.int(), more)), both.transpose(0, 1).contiguous())

    @classmethod
    def of_torchao(cls, linear: torch.nn.Linear) -> "Int4Linear":
        """The same integers as a linear layer with torchao's tile-packed weight, without its padding beyond 128."""
        self, weight = cls.__new__(cls), linear.weight
        inputs = self._begin(linear.in_features, linear.out_features, weight.block_size[-1], linear.bias)
        tiles, groups = inputs // INPUTS, inputs // self.group
        self._hold(weight.qdata[:, :tiles].contiguous(), weight.scale_and_zero[:groups].contiguous())
        return self

    def _begin(self, in_features, out_features, group, bias) -> int:
        """Returns the inputs that the kernel needs, with padding."""
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight, self.bias, self.group, self.unpack_rows = None, bias, group, UNPACK_ROWS
        return -(-in_features // max(INPUTS, group)) * max(INPUTS, group)

    def _hold(self, packed, scales_and_zeros):
        self.padding = scales_and_zeros.shape[0] * self.group - self.in_features
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales_and_zeros)
        self.order = _order(packed.device) if packed.device.type == "cuda" else None

    def unpacked(self) -> torch.Tensor:
        """The weight [out, in] that the layer computes with."""
        # Contiguous, or the result would take their strides.
        scale, zero = (part.contiguous() for part in self.scales_and_zeros.transpose(0, 1).unsqueeze(2).unbind(-1))
        if self.order is None:
            # The layout for CPUs depends on the processor: multiply the integers, with scale 1, by the identity.
            plain = torch.zeros_like(self.scales_and_zeros)
            plain[..., 0] = 1
            inputs = self.in_features + self.padding
            eye = torch.eye(inputs, dtype=plain.dtype)
            values = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, self.packed, self.group, plain).T
        else:
            tiles = _nibbles(self.packed)[..., self.order]
            rows, columns = self.packed.shape[0], self.packed.shape[1]
            values = torch.empty(rows, 8, columns, INPUTS, dtype=scale.dtype, device=self.packed.device)
            values.copy_(tiles.view(rows, columns, 8, INPUTS).transpose(1, 2))
            values = values.view(rows * 8, columns * INPUTS).sub_(8)
        grouped = values.reshape(values.shape[0], -1, self.group)
        weight = torch.addcmul(zero, grouped, scale).reshape(values.shape)
        return weight[: self.out_features, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] >= self.unpack_rows:
            return F.linear(x, self.unpacked().to(x.dtype), self.bias)
        if self.padding:
            rows = F.pad(rows, (0, self.padding))
        cpu = self.packed.device.type == "cpu"
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if cpu else torch.ops.aten._weight_int4pack_mm
        out = multiply(rows.contiguous(), self.packed, self.group, self.scales_and_zeros)[:, : self.out_features]
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


def _of_compressed(module: torch.nn.Linear) -> Int4Linear:
    """The integers of a layer as compressed-tensors keeps them before their first use."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    held = module._parameters
    scale = held["weight_scale"].detach()
    shape = torch.Size((module.out_features, module.in_features))
    values = unpack_from_int32(held["weight_packed"].detach(), 4, shape)
    zero = torch.zeros_like(scale)
    if held.get("weight_zero_point") is not None:
        points = held["weight_zero_point"].detach()
        zero = -unpack_from_int32(points, 4, scale.shape, packed_dim=0).to(scale.dtype) * scale
    dtype = scale.dtype if scale.device.type == "cpu" else torch.bfloat16
    return Int4Linear(values.int() + 8, scale, zero, module.bias, dtype)


def replace_layers(model: torch.nn.Module) -> int:
    """Replace every layer that holds packed 4-bit integers, before the model's first forward pass; returns their
    number."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module._parameters.get("weight_packed") is not None:
            found[name] = _of_compressed
        elif hasattr(getattr(module, "weight", None), "scale_and_zero"):
            found[name] = Int4Linear.of_torchao
    for name, convert in found.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, convert(model.get_submodule(name)).eval())
    if hasattr(model, "ct_decompress_hook"):  # would unpack the model at its first forward pass
        model.ct_decompress_hook.remove()
        del model.ct_decompress_hook
    return len(found)
