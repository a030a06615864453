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


def run(rows: int, columns: int, seconds: float = 120) -> dict:
    """One layer of INNER -> `columns` over `rows` rows, in a process of its own.

    Returns rows, columns, elements, exit_code (negative: killed by that signal; None: it did not end in `seconds`) and
    last_line (of what it printed).
    """
    command = [sys.executable, "-m", "helpers.benchmark.int8_limit", str(rows), str(columns)]
    result = {"rows": rows, "columns": columns, "elements": rows * columns}
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

    Returns runs: two results of `run`, the first just under the limit, the second on it (none where it can't be tried),
    and reason: why it can't be tried here.
    """
    over = LIMIT // columns
    if not torch.cuda.is_available():
        return {"runs": [], "reason": "the overflow is in a CUDA kernel, and there is no GPU here"}
    # Input in 16 and 8 bit, weight, int32 result, 16-bit output twice (one is a cast).
    needed = over * INNER * 3 + INNER * columns * 3 + over * columns * (4 + 2 + 2)
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        reason = f"needs {needed / 2**30:.1f} GiB of free GPU memory, and {free / 2**30:.1f} are free"
        return {"runs": [], "reason": reason}
    return {"runs": [run(over - 64, columns), run(over, columns)], "reason": None}


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
