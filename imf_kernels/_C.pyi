# What csrc/bindings.cpp registers. Pointers are torch.Tensor.data_ptr() (0: not there), sizes and
# strides count elements, types are the values of imf_kernels.cpu.DTYPES.
# tests/test_build.py compares the names and the numbers of arguments with the module.

openmp: bool
cuda_architectures: str

def supported_isas() -> list[str]: ...
def isa_unavailable(name: str, /) -> str: ...
def set_isa(name: str, /) -> None: ...
def get_isa() -> str: ...
def rms_norm_forward(
    x_type: int,
    y_type: int,
    x: int,
    x_dot: int,
    weight: int,
    y: int,
    y_dot: int,
    rstd: int,
    rows: int,
    tangent_rows: int,
    width: int,
    x_stride: int,
    x_dot_stride: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def rms_norm_backward(
    x_type: int,
    y_type: int,
    x: int,
    dy: int,
    weight: int,
    rstd: int,
    dx: int,
    dweight: int,
    rows: int,
    width: int,
    x_stride: int,
    dy_stride: int,
    threads: int,
    /,
) -> None: ...
