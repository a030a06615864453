"""Figures: the real drawing code on made-up results."""

import copy
import itertools
import xml.etree.ElementTree as ElementTree

import matplotlib
import nbformat
import numpy as np
import pytest
from made_up import FOUR, LABELS, MODES, PAPER, result, study_results
from matplotlib.image import imread
from matplotlib.text import Text
from nbclient import NotebookClient

from helpers import ROOT, results
from helpers.analysis import figures, figures_accuracy, figures_hardware
from helpers.analysis import figures_style as style
from helpers.analysis.figures_style import Missing

SEVEN = tuple(LABELS)
CASES = {
    "four": (FOUR, tuple(MODES)),
    "seven": (SEVEN, tuple(MODES)),
    "cpu": (FOUR, ("eager",), 20),  # fewer dialogues than the redraw has
    "two": (("fp16", "nf4", "fp4"), ("eager",)),
}


@pytest.fixture(scope="module")
def cases(study):
    return {name: study_results(study, *case) for name, case in CASES.items()}


@pytest.fixture
def four(cases):
    return copy.deepcopy(cases["four"])


def draw(study, name, case):
    return figures.draw(name, study, *case)


def visible_texts(figure) -> list:
    """(text, box in pixels) of everything that is written when a figure is rendered."""
    written = []

    def record(artist, renderer):
        if artist.get_visible() and artist.get_text().strip():
            written.append(artist)
        drawn(artist, renderer)

    drawn, Text.draw = Text.draw, record
    try:
        with matplotlib.rc_context(style.STYLE):
            figure.canvas.draw()
    finally:
        Text.draw = drawn
    return [(artist.get_text(), Text.get_window_extent(artist)) for artist in written]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", figures.FIGURES)
def test_nothing_is_cut_off_and_no_text_covers_another(study, cases, name, case):
    figure = draw(study, name, cases[case])
    texts = visible_texts(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert texts
    for text, box in texts:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, f"{text!r} leaves the figure"
    for (a, box_a), (b, box_b) in itertools.combinations(texts, 2):
        across = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        down = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert across < 2 or down < 3, f"{a!r} and {b!r} overlap by {across:.0f} x {down:.0f} pixels"


@pytest.mark.parametrize("called", ["smollm2-135m", "llama-3.2-1b-random"])
def test_diagram_texts_stay_in_their_boxes(study, cases, called):
    """Every text that starts in a box ends in it."""
    study = study.model_copy(update={"study": called})
    for name in ("setup_1_model", "setup_2_infra", "setup_3_eval"):
        figure = draw(study, name, cases["seven"])
        texts = visible_texts(figure)
        boxes = [p.get_window_extent() for p in figure.axes[0].patches]
        assert boxes
        for text, box in texts:
            middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
            for frame in (b for b in boxes if b.contains(*middle)):
                assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, (
                    f"{name}: {text!r}"
                )


def test_draw_all_saves_png_and_svg_the_same_every_time(study, four, tmp_path):
    done = figures.draw_all(study, *four, tmp_path / "a")
    assert done == dict.fromkeys(figures.FIGURES, "ok")
    names = ["fig1_accuracy_vs_memory", "latency"]
    figures.draw_all(study, *four, tmp_path / "b", names)
    for name in names:
        for kind in ("png", "svg"):
            assert (tmp_path / "a" / f"{name}.{kind}").read_bytes() == (tmp_path / "b" / f"{name}.{kind}").read_bytes()
    assert not list((tmp_path / "a").glob(".*"))
    for name in figures.FIGURES:
        assert imread(tmp_path / "a" / f"{name}.png").shape[1] == style.WIDTH * figures.PNG_DPI
        svg = ElementTree.parse(tmp_path / "a" / f"{name}.svg").getroot()
        words = " ".join(e.text or "" for e in svg.iter("{http://www.w3.org/2000/svg}text"))
        assert len(words) > 20, "text became outlines"
    assert "LLM.int8()" in (tmp_path / "a" / "latency.svg").read_text()


def test_missing_results_give_a_reason_and_remove_an_older_figure(study, four, tmp_path):
    found, _ = four
    for parts in found.values():
        del parts["fidelity"]
        parts["evaluation"] = result(study, parts["evaluation"].configuration, "evaluation", None, "the disk is full")
    (tmp_path / "kl.png").write_bytes(b"older")
    done = figures.draw_all(study, found, {"paper": PAPER}, tmp_path)
    assert "fidelity" in done["kl"] and not (tmp_path / "kl.png").exists()
    assert "the disk is full" in done["fig2_bar_comparison"] and "the disk is full" in done["setup_3_eval"]
    for name in (
        "fig4_throughput",
        "fig5_memory_waterfall",
        "latency",
        "roofline",
        "setup_1_model",
        "setup_2_infra",
        "fig6_summary_metrics",
    ):
        assert done[name] == "ok"
    assert "redrawn" in done["redraw"]


def test_no_results_at_all_are_reasons_not_errors(study, tmp_path):
    done = figures.draw_all(
        study, {"fp16": {"benchmark": result(study, "fp16", "benchmark", None, "no GPU memory")}}, {}, tmp_path
    )
    assert "no GPU memory" in done["latency"]
    assert [name for name, outcome in done.items() if outcome == "ok"] == ["setup_1_model", "setup_2_infra"]


def test_one_failed_configuration_stays_visible(study, four):
    found, analysis = four
    found["int8"]["evaluation"] = result(study, "int8", "evaluation", None, "ran out of memory")
    analysis["means"] = [row for row in analysis["means"] if row["configuration"] != "int8"]
    texts = [text for text, _ in visible_texts(draw(study, "fig2_bar_comparison", four))]
    assert "failed: ran out of memory" in texts
    assert "LLM.int8(): evaluation failed: ran out of memory." in figures.caption(
        "fig2_bar_comparison", study, found, analysis
    )


def test_bars_start_at_zero_and_have_the_means_and_intervals(study, four):
    found, analysis = four
    figure = draw(study, "fig2_bar_comparison", four)
    for axes, metric in zip(figure.axes, ("f1", "em")):
        rows = [style.mean(analysis, name, metric) for name in found]
        assert [bar.get_x() for bar in axes.patches] == [0] * len(found)
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([row["mean"] for row in rows])
        assert axes.get_xlim()[0] == 0
        drawn = [
            container.lines[2][0].get_segments()[0][:, 0]
            for container in axes.containers
            if hasattr(container, "has_xerr")
        ]
        assert np.ravel(drawn) == pytest.approx(np.ravel([[row["ci_low"], row["ci_high"]] for row in rows]))


def test_throughput_is_batch_over_time_with_its_quartiles_the_right_way_round(study, four):
    found, _ = four
    axes = draw(study, "fig4_throughput", four).axes[0]
    nf4 = axes.containers[list(found).index("nf4")]
    rows = [row for row in found["nf4"]["benchmark"].data["decode"] if row["mode"] == "eager"]
    assert nf4.lines[0].get_ydata() == pytest.approx([1e3 * r["batch"] / r["median_ms_per_token"] for r in rows])
    low, high = np.array(nf4.lines[2][0].get_segments())[:, :, 1].T
    assert low == pytest.approx([1e3 * r["batch"] / r["q75_ms_per_token"] for r in rows])
    assert high == pytest.approx([1e3 * r["batch"] / r["q25_ms_per_token"] for r in rows])


def test_the_papers_values_are_hollow_and_in_eager_mode_only(study, four):
    eager, graph, _ = draw(study, "fig4_throughput", four).axes
    hollow = [line for line in eager.lines if line.get_markerfacecolor() == "none"]
    assert sorted(float(line.get_ydata()[0]) for line in hollow) == sorted(
        PAPER["fp16"]["throughput_tokens_per_second"].values()
    )
    assert not [line for line in graph.lines if line.get_markerfacecolor() == "none"]


def test_roofline_points_lie_below_the_roof(study, four):
    axes = draw(study, "roofline", four).axes[0]
    for container in axes.containers:
        x, y = container.lines[0].get_data()
        assert (np.array(y) <= np.minimum(3000.0 * np.array(x) / 1e3, 700.0)).all()
    rows = [r for r in four[0]["nf4"]["benchmark"].data["decode"] if r["mode"] == "compile"]
    nf4 = axes.containers[list(four[0]).index("nf4")].lines[0]
    assert nf4.get_ydata()[0] == pytest.approx(2 * 134_515_008 / rows[0]["median_ms_per_token"] * 1e3 / 1e12)


@pytest.mark.parametrize(
    ("sizes", "f1", "front"),
    [
        ({"a": 500, "b": 170}, {"a": 0.5, "b": 0.4}, "ab"),
        ({"a": 500, "b": 170}, {"a": 0.4, "b": 0.5}, "b"),
        ({"a": 170.2, "b": 170.0}, {"a": 0.5, "b": 0.4}, "a"),  # 0.1% smaller is not smaller
        ({"a": 170, "b": 170}, {"a": 0.4, "b": 0.4}, "ab"),
    ],
)
def test_pareto_front(sizes, f1, front):
    rows = {name: {"mean": value} for name, value in f1.items()}
    found = [b for b in sizes if not any(figures_accuracy._dominates(a, b, sizes, rows) for a in sizes)]
    assert "".join(found) == front


def test_a_comparison_can_be_turned_round():
    row = {"metric": "f1", "a": "x", "b": "y", "difference": 0.1, "ci_low": -0.05, "ci_high": 0.2}
    turned = style.difference({"comparisons": [row]}, "y", "x", "f1")
    assert (turned["difference"], turned["ci_low"], turned["ci_high"]) == (-0.1, -0.2, 0.05)
    assert style.difference({"comparisons": [row]}, "x", "y", "f1") == row
    assert style.difference({"comparisons": [row]}, "x", "y", "em") is None


def test_memory_parts_add_up_and_are_not_guessed():
    memory = {"allocated_mb": 170.0, "quantization_state_mb": 5.0}
    assert figures_hardware.memory_parts(memory) == {"weights": 165.0, "state": 5.0}
    assert figures_hardware.memory_parts(memory | {"linear_layers_mb": 60.0}) == {
        "linear": 60.0,
        "state": 5.0,
        "rest": 105.0,
    }
    assert figures_hardware.memory_parts({"allocated_mb": 170.0}) is None


def test_configurations_look_different_and_keep_their_looks():
    names = [*SEVEN, "mine", "other"]
    looks = [style.look(dict.fromkeys(names), name) for name in names]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(names)
    assert style.look(dict.fromkeys(["nf4"]), "nf4") == style.look(dict.fromkeys(names), "nf4")


def test_odd_labels_are_drawn_as_they_are_and_escaped(study, four, tmp_path):
    found, analysis = four
    for result_ in found["nf4"].values():
        result_.provenance["configuration"]["label"] = "<b>$x^2 & co"
    found["fp4"]["benchmark"] = result(study, "fp4", "benchmark", None, "<script>alert(1)</script>")
    page = figures.show(["fig4_throughput", "setup_1_model"], study, found, analysis, tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page and page.count("<figure") == 2
    svg = (tmp_path / "fig4_throughput.svg").read_text()
    assert "&lt;b&gt;$x^2 &amp; co" in svg
    ElementTree.fromstring(svg)


def test_captions_say_n_spread_and_hardware_from_the_results(study, four):
    found, analysis = four
    text = figures.caption("fig1_accuracy_vs_memory", study, found, analysis)
    for part in (
        "500 questions in 50 dialogues",
        "95% intervals",
        "Some GPU 80GB",
        "Llama-3.2-1B",
        study.model.already_quantized,
    ):
        assert part in text
    for row in (row for row in analysis["means"] if row["metric"] == "f1"):
        row |= {
            "n_questions": 61,
            "n_dialogues": 7,
            "ci_low": None,
            "ci_high": None,
            "reason": "no interval: 7 dialogues are fewer than 10",
        }
    text = figures.caption("fig1_accuracy_vs_memory", study, found, analysis)
    assert "61 questions in 7 dialogues." in text and "No interval: 7 dialogues" in text and "95%" not in text
    draw(study, "fig1_accuracy_vs_memory", (found, analysis))
    for name in figures.FIGURES:
        assert "  " not in figures.caption(name, study, found, analysis)


def test_a_perplexity_without_interval_is_explained_unless_it_is_full_precisions_own(study, four):
    found, analysis = four
    for name, few in (("fp16", 0), ("nf4", 3)):
        found[name]["fidelity"].data["perplexity"]["all"]["reason"] = (
            f"no interval: only {few} of 50 dialogues differ, fewer than 5"
        )
    text = figures.caption("fig6_summary_metrics", study, found, analysis | {"full": "fp16"})
    assert "Perplexity: no interval: only 3 of 50" in text and "only 0 of 50" not in text


def test_captions_of_times_say_what_disturbed_them_and_which_mode_is_missing(study, four):
    found, analysis = four
    found["int8"]["benchmark"].data |= {
        "conditions": {"warnings": ["other processes used 40% of this machine's 2 cores meanwhile"]},
        "sizes": {"modes": ["eager", "cuda_graph"]},
        "modes": {
            "eager": {"ok": True, "reason": None},
            "cuda_graph": {"ok": False, "reason": "it synchronizes"},
            "compile": {"reason": "no"},
        },
    }
    text = figures.caption("latency", study, found, analysis)
    assert (
        "LLM.int8(): other processes used 40% of this machine's 2 cores meanwhile. LLM.int8(): CUDA graph: it synchronizes."
        in text
    )
    assert "torch.compile" not in text and "Llama-3.2-1B, come without n or spread" in text


def test_hardware_only_study_has_its_figures(study, four, tmp_path):
    found, _ = four
    for parts in found.values():
        del parts["fidelity"], parts["evaluation"]
    done = figures.draw_all(study, found, {}, tmp_path)
    drawn = {name for name, outcome in done.items() if outcome == "ok"}
    hardware = {"fig4_throughput", "fig5_memory_waterfall", "latency", "roofline", "setup_1_model", "setup_2_infra"}
    assert drawn == hardware | {"fig3_nf4_vs_fp4", "fig6_summary_metrics"}
    for name in drawn:
        assert figures.caption(name, study, found, {})


def test_lookups_say_what_is_missing(study, four):
    found, _ = four
    with pytest.raises(Missing, match=r"memory\.nothing was not measured"):
        style.with_value(found, "benchmark", "memory.nothing")
    assert style.plain(0.00002) == "2e-5" and style.plain(4096.0) == "4,096" and style.plain(0.5) == "0.5"


def test_the_notebook_draws_everything_from_files_alone(study, four, tmp_path):
    found, analysis = four
    for name, parts in found.items():
        for kind, one in parts.items():
            results.write_text(tmp_path / name / f"{kind}.json", one.model_dump_json())
    results.write_text(
        tmp_path / "analysis.json", result(study, None, "analysis", {"numbers": analysis}).model_dump_json()
    )
    notebook = nbformat.read(ROOT / "notebooks" / "05_figures.ipynb", 4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"folder = {str(tmp_path)!r}"))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    pages = [
        o["data"]["text/html"]
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "text/html" in o.get("data", {})
    ]
    assert sum(page.count("<figure") for page in pages) == len(figures.FIGURES)
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == set(figures.FIGURES)


def test_numbers_that_are_not_there_have_a_reason(study, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "folder", lambda study: tmp_path)
    assert figures.read_numbers(study)[0] == {} and "missing" in figures.read_numbers(study)[1]
    results.write_text(
        tmp_path / "analysis.json", result(study, None, "analysis", None, "no evaluation").model_dump_json()
    )
    assert figures.read_numbers(study) == ({}, "analysis failed: no evaluation")
