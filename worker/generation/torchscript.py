"""A TorchScript file that may do arithmetic and nothing else.

Such a file is a program that comes with its weights. TorchScript can read and write files (`aten::
from_file`, `aten::save`) and call other machines, so what is not known to be arithmetic is refused:
before it is loaded the one method that loading calls, after that every operation that `forward`
can come to. It still may take as long as it likes.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MAX_CODE_BYTES = 16 * 2**20
# As of detectors: convolutions, activations, and what turns grids into boxes.
_ON_TENSORS = """
Bool Float FloatImplicit Int IntImplicit ScalarImplicit __and__ __contains__ __derive_index
__getitem__ __is__ __isnot__ __not__ __or__ __range_length _convolution _set_item _unwrap_optional
_upsample_bicubic2d_aa _upsample_bilinear2d_aa abs adaptive_avg_pool2d add add_ all amax amin any
append arange argmax argmin argsort avg_pool2d batch_norm bitwise_and bitwise_not bitwise_or bmm cat
ceil chunk clamp clamp_ clamp_max clamp_min clone contiguous conv1d conv2d conv_transpose2d copy
copy_ cumsum detach dict dim div div_ divide dropout einsum elu embedding empty_like eq exp expand
expand_as extend fill_ flatten flip floor floor_divide floordiv format full full_like gather ge
gelu get group_norm gt hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ index
index_select instance_norm is_floating_point item items keys layer_norm le leaky_relu leaky_relu_
len linear linspace list log log_softmax logical_and logical_not logical_or lt masked_fill
masked_fill_ masked_select matmul max max_pool2d maximum mean meshgrid min minimum mm movedim mul
mul_ multiply narrow ne neg new_full new_ones new_zeros nonzero norm numel ones ones_like pad
permute pixel_shuffle pow prelu prod reciprocal relu relu6 relu6_ relu_ remainder repeat
repeat_interleave
reshape reshape_as resolve_conj resolve_neg reverse roll round rsqrt rsub scatter select sigmoid
sigmoid_ silu silu_ sin size slice softmax softplus sort split split_with_sizes sqrt square squeeze
stack std str sub sub_ subtract sum t take tanh tanh_ tensor tensor_split tile to topk transpose
tril triu type_as unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
values var view view_as warn where zero_ zeros zeros_like
"""
_OF_THE_LANGUAGE = """
Constant ConstantChunk CreateObject DictConstruct GetAttr If ListConstruct ListUnpack Loop
NumToTensor RaiseException SetAttr TupleConstruct TupleIndex TupleSlice TupleUnpack Uninitialized
device dtype is_cuda isinstance layout max min unchecked_cast unchecked_unwrap_optional
"""
ARITHMETIC = frozenset(
    [f"aten::{name}" for name in _ON_TENSORS.split()]
    + [f"prim::{name}" for name in _OF_THE_LANGUAGE.split()]
)


class NoArithmeticError(ValueError):
    """A file that does more than arithmetic; the message says what, for the log."""


def load(path: Path) -> Any:
    """The script in the file, on the CPU; call its `forward`.

    Raises:
        NoArithmeticError: it does more than arithmetic, or nobody can say what.
        RuntimeError: torch does not read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            code = [entry for entry in archive.infolist() if entry.filename.endswith(".py")]
            if sum(entry.file_size for entry in code) > MAX_CODE_BYTES:
                raise NoArithmeticError(f"{path.name} holds more code than any detector")
            if any(b"__setstate__" in archive.read(entry) for entry in code):
                raise NoArithmeticError(f"{path.name} has code that runs as it is loaded")
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise NoArithmeticError(f"{path.name} is no TorchScript: {error}") from None
    script = torch.jit.load(str(path), map_location="cpu")
    others = {node.kind() for node in _nodes(script.inlined_graph)} - ARITHMETIC
    if others:
        raise NoArithmeticError(
            f"{path.name} does more than arithmetic: {', '.join(sorted(others))}"
        )
    return script


def _nodes(block: Any) -> Iterator[Any]:
    """Each operation of a graph, those of its branches and loops too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
