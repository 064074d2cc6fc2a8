def shard_statistics(
    *,
    logits: int,
    dtype: str,
    row_stride: int,
    tokens: int,
    target: int,
    vocab_start: int,
    columns: int,
    ignore_index: int,
    softcap: float = 0.0,
    temperature: float = 1.0,
    distance: bool = False,
    statistics: int,
    threads: int,
) -> None: ...
def shard_gradient(
    *,
    logits: int,
    dtype: str,
    row_stride: int,
    tokens: int,
    width: int,
    target: int,
    vocab_start: int,
    columns: int,
    ignore_index: int,
    softcap: float = 0.0,
    temperature: float = 1.0,
    distance: bool = False,
    coefficients: int,
    out: int,
    out_row_stride: int,
    threads: int,
) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> bool: ...

# Only where it was built with CUDA.
CUDA_MAX_SPLITS: int
CUDA_WORKSPACE_FLOATS: int

def cuda_shard_statistics(
    *,
    logits: int,
    dtype: str,
    row_stride: int,
    tokens: int,
    target: int,
    vocab_start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    temperature: float,
    distance: bool,
    statistics: int,
    splits: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_shard_gradient(
    *,
    logits: int,
    dtype: str,
    row_stride: int,
    tokens: int,
    width: int,
    target: int,
    vocab_start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    temperature: float,
    distance: bool,
    coefficients: int,
    out: int,
    out_row_stride: int,
    device: int,
    stream: int,
) -> None: ...
