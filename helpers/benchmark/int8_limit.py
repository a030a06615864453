"""Why LLM.int8() "does not work on a GPU": rows x columns of one layer's output must stay under 2**31.

bitsandbytes multiplies in int8, then scales the int32 result (`dequant_mm_int32_fp16`, csrc/ops.cu), where
`int n = numRows * numCols` overflows at 2**31. The launch that follows is invalid, and the check after it prints
"Error invalid configuration argument at line ... in file /src/csrc/ops.cu" and ends the process: nothing can be
caught. lm-eval's automatic batch size begins at 64 rows of the model's maximum length, far beyond.

    int8_limit.reproduce()    # a child process on either side of the limit

Run as a program it is one such child: `python -m helpers.benchmark.int8_limit ROWS COLUMNS`.
"""

import subprocess
import sys

import torch

from helpers import ROOT

LIMIT = 2**31
INNER = 2048  # columns of the input: hidden size of Llama-3.2-1B
COLUMNS = 8192  # of the output: its feed-forward size
RULE = "rows x columns < 2**31: tokens in one forward pass times the widest int8 layer's outputs"


def fits(rows: int, columns: int) -> bool:
    """Whether a layer of `columns` outputs survives `rows` tokens in one pass."""
    return rows * columns < LIMIT


def most_rows(columns: int) -> int:
    """The largest number of tokens in one pass (batch x length) for a layer of `columns` outputs."""
    return (LIMIT - 1) // columns


def needed_bytes(rows: int, columns: int) -> int:
    """Device memory of one such layer's pass: input in 16 and 8 bit, weight, int32 result, 16-bit output twice (one
    is a cast)."""
    return rows * INNER * 3 + INNER * columns * 3 + rows * columns * (4 + 2 + 2)


def run(rows: int, columns: int, seconds: float = 120) -> dict:
    """One layer of INNER -> `columns` over `rows` rows, in a process of its own.

    Returns rows, columns, elements, under_limit, exit_code (negative: killed by that signal; None: it did not end in
    `seconds`) and last_line (of what it printed).
    """
    command = [sys.executable, "-m", "helpers.benchmark.int8_limit", str(rows), str(columns)]
    result = {"rows": rows, "columns": columns, "elements": rows * columns, "under_limit": fits(rows, columns)}
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return result | {"exit_code": None, "last_line": f"did not end within {seconds:.0f} s"}
    # The C library's message and Python's go through separate streams; the message is what matters if the child died.
    lines = (child.stdout if child.returncode == 0 else child.stdout + "\n" + child.stderr).strip().splitlines()
    errors = [line for line in lines if "ops.cu" in line]
    return result | {"exit_code": child.returncode, "last_line": (errors or lines or [""])[-1].strip()}


def reproduce(columns: int = COLUMNS) -> dict:
    """The crash, on either side of the limit.

    Returns rule, limit, most_rows, and either runs (two results of `run`, the first just under the limit, the second
    on it) and reproduced (the first lived and the second died), or reason: why it can't be tried here.
    """
    import bitsandbytes

    over = LIMIT // columns
    result = {
        "rule": RULE,
        "limit": LIMIT,
        "columns": columns,
        "most_rows": most_rows(columns),
        "bitsandbytes": bitsandbytes.__version__,
    }
    if not torch.cuda.is_available():
        return result | {
            "runs": [],
            "reproduced": None,
            "reason": "the overflow is in a CUDA kernel, and there is no GPU here",
        }
    free, _ = torch.cuda.mem_get_info()
    needed = needed_bytes(over, columns)
    if free < needed:
        reason = f"needs {needed / 2**30:.1f} GiB of free GPU memory, and {free / 2**30:.1f} are free"
        return result | {"runs": [], "reproduced": None, "reason": reason}
    runs = [run(over - 64, columns), run(over, columns)]
    reproduced = runs[0]["exit_code"] == 0 and runs[1]["exit_code"] not in (0, None)
    return result | {"runs": runs, "reproduced": reproduced, "reason": None}


@torch.no_grad()
def main(argv: list[str]) -> None:
    from bitsandbytes.nn import Linear8bitLt

    rows, columns = (int(a) for a in argv)
    if not torch.cuda.is_available():
        raise SystemExit("the overflow is in a CUDA kernel, and there is no GPU here")
    layer = Linear8bitLt(INNER, columns, bias=False, has_fp16_weights=False).half().cuda()
    out = layer(torch.ones(rows, INNER, dtype=torch.float16, device="cuda"))
    torch.cuda.synchronize()
    print(f"{rows} x {columns} = {out.numel()}: finite {bool(torch.isfinite(out[-1]).all())}")


if __name__ == "__main__":
    main(sys.argv[1:])
