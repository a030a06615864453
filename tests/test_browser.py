"""Pages in a real browser: the committed results' report, samples.html, and a small notebook with what goes wrong."""

import base64
import copy
import os
import shutil
import socket
import subprocess
import sys
from functools import partial

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Error, sync_playwright

from helpers import ROOT, notebook
from helpers.analysis import frames, samples

REFERENCE = "executed/reference/hopper/smollm2-135m"
LARGEST = 6e6  # bytes of the report
FILTER_MS = 300
SETTINGS = [(width, scheme) for width in (390, 768, 1280) for scheme in ("light", "dark")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium, then these tests run")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Open a file; at the end of the test the page has written no error and asked no other address."""
    opened, faults = [], []

    def go(path, width=1280, scheme="light", fragment=""):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        opened.append(context)
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else faults.append(r.url))
        page.goto(f"file://{path}{fragment}")
        return page

    yield go
    for context in opened:
        context.close()
    assert faults == []


def sideways(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def serious(page) -> list:
    """axe-core's findings that are serious or critical."""
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


# ---- the report of the committed results ----


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """A copy of the project in which make has rendered the committed results; returns the folder of results."""
    root = tmp_path_factory.mktemp("rendered")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("executed/", "figures/")) and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    shutil.copytree(ROOT / REFERENCE, root / REFERENCE)
    (root / REFERENCE / "report.html").unlink(missing_ok=True)
    command = ["make", "report", "report-pdf", "llm-comparator", f"PYTHON={sys.executable}", f"RESULTS={REFERENCE}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / REFERENCE


@pytest.mark.parametrize("width, scheme", SETTINGS)
def test_report_fits_every_width_and_theme(rendered, visit, width, scheme):
    page = visit(rendered / "report.html", width, scheme)
    assert sideways(page) == 0
    figures = page.evaluate(
        """[...document.querySelectorAll('figure img')].map(i => [i.alt, i.naturalWidth,
           i.getBoundingClientRect().width, i.getBoundingClientRect().height])"""
    )
    assert len(figures) > 8 and all(
        alt and natural and wide > 100 and high > 50 for alt, natural, wide, high in figures
    )


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_report_has_no_serious_accessibility_finding(rendered, visit, width, scheme):
    assert serious(visit(rendered / "report.html", width, scheme)) == []


def test_first_screen_says_whether_to_use_nf4(rendered, visit):
    answer = visit(rendered / "report.html").get_by_text("Should I use NF4?")
    box = answer.bounding_box()
    assert (
        box["y"] + box["height"] < 800
        and "It keeps" in answer.inner_text()
        and "of FP16's memory" in answer.inner_text()
    )


def test_flips_and_scores_lead_to_their_answers(rendered, visit):
    page = visit(rendered / "report.html")
    cell = page.get_by_role("row").filter(has_text="Right to wrong (%)").locator("xpath=../..")
    links = cell.locator("a[href*='b=nf4'][href*='flip=lost']")
    assert page.locator("a[href='samples.html#a=fp16&b=fp4']").count() == 2  # its F1, its exact match
    links.first.click()
    page.wait_for_url("**/samples.html#*")
    assert page.locator(".row").count() > 5 and page.locator("#count").inner_text().split()[2] == "597"


def test_report_is_one_small_file_and_prints(rendered):
    assert (rendered / "report.html").stat().st_size < LARGEST
    printed = (rendered / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and b"file:" not in printed  # no path of this machine
    assert (rendered / "llm_comparator_fp16_nf4.json").is_file()


def test_jupyterlab_gets_no_style_or_script_from_04(rendered):
    executed = nbformat.read(rendered / "04_analysis.ipynb", 4)
    outputs = [o for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs]
    texts = [str(output.get("data", {}).get("text/html", "")) for output in outputs]
    assert len(texts) > 10 and not [t[:80] for t in texts if "<style" in t or "<script" in t or "<link" in t]


@pytest.fixture(scope="module")
def lab(rendered, tmp_path_factory):
    """Address of a JupyterLab of its own over the executed notebooks, which it trusts."""
    own = tmp_path_factory.mktemp("lab")
    folders = {f"JUPYTER_{kind}_DIR": str(own / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | folders | {"JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces")}
    jupyter = [sys.executable, "-m", "jupyter"]
    subprocess.run(
        [*jupyter, "trust", "04_analysis.ipynb"], cwd=rendered, env=environment, check=True, capture_output=True
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=", "--ip=127.0.0.1"]
    with open(own / "log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, cwd=rendered, env=environment, stdout=log, stderr=log)
        yield f"http://127.0.0.1:{port}/lab/tree/04_analysis.ipynb"
        server.kill()
        server.wait()


@pytest.mark.skipif("JUPYTERLAB" not in os.environ, reason="takes a minute: JUPYTERLAB=1 make test runs it as well")
def test_jupyterlab_shows_04_whole_and_keeps_its_own_look(lab, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for _ in range(60):  # seconds until the server answers
        try:
            page.goto(lab)
            break
        except Error:
            page.wait_for_timeout(1000)
    page.locator(".jp-Notebook figure img").first.wait_for(timeout=60_000)
    styles = page.evaluate("document.querySelectorAll('.jp-OutputArea :is(style, link, script)').length")
    body = page.evaluate("[getComputedStyle(document.body).overflow, getComputedStyle(document.body).maxWidth]")
    inside = page.evaluate(
        """[...document.querySelectorAll('.jp-Notebook figure img')].map((image) => {
          const own = image.getBoundingClientRect();
          const output = image.closest('.jp-OutputArea-output').getBoundingClientRect();
          return own.left >= output.left && own.right <= output.right + 1;
        })"""
    )
    page.close()
    assert styles == 0 and body == ["hidden", "none"] and inside and all(inside)


# ---- what goes wrong, in a small notebook ----

HOSTILE = "<script>document.title = 'owned'</script>"
LONG = "<table class='dataframe'><thead><tr><th>Format</th><th>ms</th></tr></thead><tbody>{}</tbody></table>"
ROWS = [
    ("NF4", "\N{MINUS SIGN}1.5 [\N{MINUS SIGN}2, 0]"),
    ("FP4", "12.0"),
    ("FP16", "1,200"),
    ("AWQ", "\N{EN DASH}"),
] * 4
STYLER = """<style>#T_a_row0_col0 { background-color: #fff3b0; }</style>
<table id="T_a"><thead><tr><th>x</th></tr></thead><tbody><tr><td id="T_a_row0_col0">painted</td></tr>
<tr><td>bare</td></tr></tbody></table>"""


def html(text):
    return new_output("display_data", data={"text/html": text})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    long = LONG.format("".join(f"<tr><td>{a}</td><td>{b}</td></tr>" for a, b in ROWS))
    wide = f"<table><tr>{'<td>' + 'wide' * 9 + '</td>'}{'<td>a_cell_that_is_long</td>' * 40}</tr></table>"
    picture = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    cells = [
        new_markdown_cell("# Title"),
        new_markdown_cell("## Abstract"),
        new_code_cell("say()", outputs=[html("<p>In short.</p>")], metadata={"tags": ["abstract"]}),
        new_markdown_cell("## Tables *and* text\n\nWords."),
        new_code_cell("x = '</code><b>'", outputs=[html(long), html(wide), html(STYLER)]),
        new_code_cell("print(1)", outputs=[new_output("stream", name="stdout", text=HOSTILE)]),
        new_code_cell("x", outputs=[new_output("execute_result", data={"text/plain": HOSTILE})]),
        new_code_cell(
            "y", outputs=[html(f"<figure><img src='{picture}' alt='A dot'><figcaption>Dot.</figcaption></figure>")]
        ),
        new_markdown_cell("## Appendix"),
        new_markdown_cell("### All & sundry\n\nSmall print.", metadata={"tags": ["appendix"]}),
        new_code_cell("z", outputs=[html("<p id='deep'>Deep.</p>")], metadata={"tags": ["appendix"]}),
        new_markdown_cell("### More", metadata={"tags": ["appendix"]}),
        new_code_cell("z", outputs=[html("<p>Last.</p>")], metadata={"tags": ["appendix"]}),
    ]
    folder = tmp_path_factory.mktemp("small <i>study")
    nbformat.write(new_notebook(cells=cells), folder / "04_analysis.ipynb")
    notebook.render(folder / "04_analysis.ipynb", folder / "report.html")
    return folder / "report.html"


def test_what_is_not_ours_is_escaped(small, visit):
    page = visit(small)
    assert page.title() == f"{small.parent.name}: report"
    assert [pre.text_content() for pre in page.locator("main pre").all() if "owned" in pre.text_content()] == [
        HOSTILE
    ] * 2
    page.locator("details.code summary").nth(1).click()
    assert "x = '</code><b>'" in page.locator("details.code[open]").inner_text()


def test_tables_sort_filter_and_scroll_in_their_own_box(small, visit):
    page = visit(small, 390)
    assert sideways(page) == 0
    table = page.locator("table.dataframe")
    cells = "t => [...t.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    header = table.locator("th", has_text="ms")
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert table.evaluate(cells) == ["NF4"] * 4 + ["FP4"] * 4 + ["FP16"] * 4 + ["AWQ"] * 4
    header.locator("button").press("Enter")  # what is missing stays last
    assert table.evaluate(cells) == ["FP16"] * 4 + ["FP4"] * 4 + ["NF4"] * 4 + ["AWQ"] * 4
    page.get_by_label("Filter 16 rows").fill("fp16")
    assert table.evaluate(cells) == ["FP16"] * 4
    boxes = page.locator(".scroll").evaluate_all("all => all.map(b => [b.scrollWidth > b.clientWidth + 1, b.tabIndex])")
    assert [True, 0] in boxes and all((index == 0) == overflows for overflows, index in boxes)


def test_contents_follow_and_appendix_folds(small, visit):
    page = visit(small)
    links = page.locator("#contents a")
    assert links.all_inner_texts() == ["Abstract", "Tables and text", "Appendix", "All & sundry", "More"]
    assert page.locator("section.abstract p").inner_text() == "In short."
    assert page.locator("#contents a[aria-current]").inner_text() in ("Abstract", "Tables and text")
    assert not page.locator("#deep").is_visible()
    page.locator("details.appendix summary").first.click()
    assert page.locator("#deep").is_visible() and page.get_by_text("Small print.").is_visible()
    assert page.locator("details.appendix").count() == 2 and not page.get_by_text("Last.").is_visible()
    page.get_by_text("More").last.scroll_into_view_if_needed()
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_function("document.querySelector('#contents a[aria-current]')?.textContent === 'More'")


def test_small_notebook_is_accessible_in_the_dark_with_painted_tables(small, visit):
    assert serious(visit(small, 390, "dark")) == []


# ---- samples ----


@pytest.fixture(scope="module")
def answers():
    return samples.collect(frames.load(REFERENCE))


def write(folder, data):
    (folder / "samples.html").write_text(samples.page(data), encoding="utf-8")
    return folder / "samples.html"


def test_eight_thousand_questions_filter_within_the_limit(answers, tmp_path, visit):
    many, n = copy.deepcopy(answers), len(answers["dialogues"])
    many["dialogues"] *= 14
    many["questions"] = [q | {"d": q["d"] + n * k} for k in range(14) for q in answers["questions"]]
    page = visit(write(tmp_path, many))
    assert page.locator(".row").count() < 40 and "8,358 of 8,358" in page.locator("#count").inner_text()
    slowest = page.evaluate(
        """async () => {
          const form = document.querySelector('#choices'), times = [];
          for (const [name, value] of [['text', 'the'], ['text', ''], ['flip', 'lost'], ['flip', ''], ['sort', 'kl']]) {
            const start = performance.now();
            form.elements[name].value = value;
            form.dispatchEvent(new Event('input', { bubbles: true }));
            await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
            times.push(performance.now() - start);
          }
          return Math.max(...times);
        }"""
    )
    assert slowest < FILTER_MS


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_a_link_opens_one_answer_beside_the_others(answers, tmp_path, visit, width, scheme):
    data, names = copy.deepcopy(answers), [c["name"] for c in answers["configurations"]]
    a, b = names.index("fp16"), names.index("nf4")
    lost = [q for q in data["questions"] if q["right"][a] and not q["right"][b]]
    lost[1]["said"][b] = f"</script>{HOSTILE}"
    key = "{set}/{id}".format(**data["dialogues"][lost[1]["d"]]) + f"/{lost[1]['turn']}"
    page = visit(write(tmp_path, data), width, scheme, f"#a=fp16&b=nf4&flip=lost&q={key}")
    assert page.locator("#count").inner_text().startswith(f"{len(lost)} of {len(data['questions'])} questions")
    assert page.locator("#detail h2").inner_text() == lost[1]["question"] and page.locator(".answer").count() == len(
        names
    )
    assert "</script>" in page.locator(".answer.chosen").nth(1).inner_text() and "answers" not in page.title()[:5]
    assert page.locator(".answer.chosen mark").count() > 0
    story = data["dialogues"][lost[1]["d"]]["story"]
    assert story[:60] in page.locator(".story").inner_text()
    page.locator("#list").press("ArrowDown")
    assert page.locator("#detail h2").inner_text() == lost[2]["question"] and "flip=lost" in page.url
    assert sideways(page) == 0 and serious(page) == []


def test_results_without_texts_say_so(answers, tmp_path, visit):
    data = copy.deepcopy(answers)
    for dialogue in data["dialogues"]:
        dialogue["story"] = None
    for q in data["questions"]:
        q |= {"question": None, "references": None, "said": [None] * len(q["said"])}
    page = visit(write(tmp_path, data))
    assert "hold no texts" in page.locator(".warning").inner_text() and page.locator(".row").count() > 5
    assert "Not in these results." in page.locator(".story").inner_text()


# ---- 06_explore ----


@pytest.mark.parametrize("folder", ["smollm2-135m", "llama-3.2-1b-random"], ids=["", "hardware alone"])
def test_explore_opens_at_once_without_torch_and_its_widgets_work(tmp_path, folder):
    book = nbformat.read(ROOT / "notebooks/06_explore.ipynb", 4)
    chosen = next(cell for cell in book.cells if cell.source.startswith("where ="))
    chosen.source = f'where = "executed/reference/hopper/{folder}"'
    asked = "import sys, time; assert 'torch' not in sys.modules; print(time.process_time())"
    calls = "times('decode', 'cuda_graph')"
    if folder == "smollm2-135m":
        calls += (
            "; scores(['nf4'], (1, 3), 'domain', 'kl'); difference('fp16', 'nf4', True, 'em'); lost('fp16', 'nf4', 5)"
        )
    first = next(i for i, cell in enumerate(book.cells) if "frames.load" in cell.source)
    book.cells.insert(first + 1, new_code_cell(asked))
    book.cells.append(new_code_cell(calls))
    nbformat.write(book, tmp_path / "explore.ipynb")
    # In a process of its own: the browser's event loop runs in this one, beside which a kernel's message can be lost.
    command = [
        sys.executable,
        "-m",
        "nbconvert",
        "--execute",
        "--to",
        "notebook",
        "--inplace",
        tmp_path / "explore.ipynb",
    ]
    run = partial(subprocess.run, command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    try:
        run(timeout=100)
    except subprocess.TimeoutExpired:  # nbclient misses a message on a busy machine, once in some full runs, and waits
        run(timeout=200)
    book = nbformat.read(tmp_path / "explore.ipynb", 4)
    assert float(book.cells[first + 1].outputs[0].text) < 5  # seconds of this process, whatever else the machine does
    shown = "".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in book.cells[-1].outputs)
    assert "NF4" in shown and ("dialogues, p" in shown) == (folder == "smollm2-135m")
