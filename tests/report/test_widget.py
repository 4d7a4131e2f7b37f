"""The page that can be moved: its numbers against the lab's observers and errors, in a real browser."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pypandoc
import pytest
import torch
from small import network

from labcore.files.artifacts import ROOT, write_json
from labcore.observer import PowerOfTwoObserver
from labcore.qconfig import CustomQConfig, Scheme
from labcore.quantize import calibrate, prepare_ptq
from labcore.report.build import MARKDOWN, widget, write_html
from labcore.studies.errors import histogram_errors, histograms, inspect_qparams

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync --virtual-time-budget=5000"
CLAMP, EXPONENTS = 8, (-14, 4)


@pytest.fixture
def tensors(batches) -> list[dict]:
    """Four tensors of the small network, and one so small that the clamp matters; it asks for 2^-12."""
    prepared = calibrate(prepare_ptq(network(), CustomQConfig.POWER2.value), batches)
    table = inspect_qparams(prepared, batches)
    keys = [("quant", "activation"), ("layer2.2.add_relu", "activation"), ("fc", "activation")]
    keys.append(("layer2.0.0", "weight"))
    rows = histograms(prepared, batches, table.set_index(["layer", "tensor"]).loc[keys].reset_index())
    assert rows[1]["min"] == 0 < rows[1]["zeros"] and rows[2]["min"] < 0
    return [*rows, rows[3] | {"min": -100 * 2.0**-12, "max": 127.5 * 2.0**-12}]


@pytest.fixture
def run_in_page(tensors, tmp_path):
    """Run JavaScript at the end of the page, as the report has it; what it gives to `found` comes back."""
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome")

    def run(script: str):
        write_json(tmp_path / "results/ptq/histograms.json", tensors)
        path = tmp_path / "page.html"
        write_html(f"# Report\n\n{widget(tmp_path / 'results')}", path)
        end = "<pre id='found'></pre><script>const found = value => {"
        end += f"document.getElementById('found').textContent = JSON.stringify(value); }};\n{script}</script>"
        text = path.read_text(encoding="utf-8").replace("</body>", f"{end}</body>")
        path.write_text(text, encoding="utf-8")
        command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={tmp_path / 'user'}", "--dump-dom"]
        page = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60).stdout
        return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', page).group(1)))

    return run


def by_labcore(tensor: dict, setting: dict) -> dict:
    """What the observers and `histogram_errors` say of a setting of the page."""
    bits, rule, zero_point = setting["bits"], setting["rule"], setting["zero_point"]
    kind, limit = tensor["tensor"], CLAMP if setting["clamp"] else None
    scheme = Scheme(
        bits,
        rule="round" if rule in ("hand", "least_error") else rule,
        zero_point="symmetric" if kind == "weight" else zero_point,
        max_shift_amount=limit,
    )
    args = scheme.observer_args(kind, full_range=True)
    if zero_point == "affine":
        args["qscheme"] = torch.per_tensor_affine
    observer = PowerOfTwoObserver(**args)
    # The page has zero point 0 also for both signs, as if nothing were negative.
    lowest = 0 if zero_point == "unsigned" else tensor["min"]
    observer(torch.tensor([lowest, tensor["max"]]))

    def at(scale: float) -> dict:
        grid = scale, int(observer._zero_point(torch.tensor([scale]))), observer.quant_min, observer.quant_max
        names = "scale", "zero_point", "quant_min", "quant_max"
        return dict(zip(names, grid, strict=True)) | histogram_errors(tensor, *grid)

    low, high = (-limit, limit) if limit else (-23, 20)  # 2^-23 is float32's eps, torch's least scale
    if rule == "hand":
        return at(2.0 ** min(max(setting["exponent"], low), high))
    if rule == "least_error":
        grids = [at(2.0**exponent) for exponent in range(high, low - 1, -1)]
        return min(grids, key=lambda found: found["mse_rounding"] + found["mse_clipping"])
    found, zero = observer.calculate_qparams()
    assert int(zero) == at(float(found))["zero_point"]
    return at(float(found))


def test_the_page_computes_what_labcore_computes(tensors, run_in_page):
    rng = np.random.default_rng(0)
    draw = {
        "bits": range(2, 9),
        "rule": ["round", "ceil", "floor", "least_error", "hand", "none"],
        "exponent": range(EXPONENTS[0], EXPONENTS[1] + 1),
        "zero_point": ["unsigned", "symmetric", "affine"],
        "clamp": [False, True],
    }
    settings = [{key: list(of)[rng.integers(len(of))] for key, of in draw.items()} for _ in range(50)]
    settings += [
        {"bits": 8, "rule": rule, "exponent": 0, "zero_point": "symmetric", "clamp": False}
        for rule in ("ceil", "floor")  # of what is a power of two already
    ]
    cases = [
        (tensor, setting)
        for setting in settings
        for tensor in tensors
        if (tensor["tensor"], setting["zero_point"]) != ("weight", "unsigned")  # the page has it not
    ]
    computed = run_in_page(
        f"""found({json.dumps(cases)}.map(([tensor, setting]) => {{
            const grid = quantizer.qparams(tensor, setting), errors = quantizer.errors(tensor, grid);
            return {{ ...grid, ...errors }};
        }}));"""
    )
    assert len(cases) > 200
    for key in ("bits", "rule", "zero_point", "clamp"):
        assert {setting[key] for setting in settings} == set(draw[key])
    for (tensor, setting), found in zip(cases, computed, strict=True):
        expected = by_labcore(tensor, setting)
        case = f"{tensor['layer']} {tensor['tensor']} {setting}"
        grid = ("scale", "zero_point", "quant_min", "quant_max")
        assert [found[key] for key in grid] == [expected[key] for key in grid], case
        error = expected["mse_rounding"] + expected["mse_clipping"]
        noise = {"share_clipped": 1, "snr_db": 1, "mse_rounding": error, "mse_clipping": error}
        for key, size in noise.items():
            assert found[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12 * size), f"{key}: {case}"


def test_a_slider_moves_the_numbers_and_draws_once_for_many_moves(tensors, run_in_page):
    tensors[0]["layer"] = "</script><b id=foreign>"
    found = run_in_page(
        """const form = document.getElementById("widget"), { exponent, bits } = form.elements;
        const shown = () => Object.fromEntries([...form.querySelectorAll("dl [data-is]")].map(
            item => [item.dataset.is, item.textContent]));
        window.requestAnimationFrame = draw => setTimeout(draw, 16); // virtual time has no frames
        const frame = () => new Promise(resolve => setTimeout(resolve, 100));
        const move = (control, value) => {
            control.value = value; control.dispatchEvent(new Event("input", { bubbles: true })); };
        (async () => {
            const first = shown(), foreign = document.getElementById("foreign") !== null;
            let draws = 0;
            new MutationObserver(records => { draws += records.length; }).observe(
                form.querySelector(".values"), { attributes: true });
            for (const k of [-12, -9, -5, 1, 0, -2]) move(exponent, k);
            await frame();
            const moved = shown(), once = draws, rule = form.elements.rule.value;
            move(bits, 4); await frame();
            const fewer = shown();
            move(form.elements.tensor, 2); form.reset(); await frame();
            const title = form.elements.tensor.options[0].text;
            const loaded = performance.getEntriesByType("resource").length;
            found({ first, moved, once, rule, fewer, again: shown(), foreign, title, loaded });
        })();"""
    )
    assert (found["once"], found["rule"]) == (1, "hand")
    start = {"bits": 8, "rule": "round", "zero_point": "symmetric", "clamp": True}
    for name, number, setting in (
        ("first", 0, start),
        ("moved", 0, start | {"rule": "hand", "exponent": -2}),
        ("fewer", 0, start | {"rule": "hand", "exponent": -2, "bits": 4}),
        ("again", 2, start),
    ):
        expected = by_labcore(tensors[number], setting)
        power = str(int(np.log2(expected["scale"]))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        assert found[name]["scale"] == f"2{power}", name
        assert found[name]["snr_db"] == f"{expected['snr_db']:.1f} dB", name
        assert found[name]["zero_point"] == str(expected["zero_point"]), name
    assert not found["foreign"] and found["title"].startswith("</script><b id=foreign>: output")
    assert found["loaded"] == 0, "everything is in the file"


def test_only_html_gets_the_part_that_moves_and_only_where_there_are_histograms(tensors, tmp_path):
    assert widget(tmp_path) == ""
    write_json(tmp_path / "ptq/histograms.json", tensors)
    block = widget(tmp_path)
    assert pypandoc.convert_text(f"a\n\n{block}\nb", "typst", format=MARKDOWN).split() == ["a", "b"]
    (script,) = re.findall(r"<script>\n(.*?)</script>", block, flags=re.DOTALL)
    assert script in pypandoc.convert_text(block, "html5", format=MARKDOWN)


def test_the_page_needs_nothing_from_elsewhere():
    text = (ROOT / "report/template_widget.html").read_text(encoding="utf-8")
    assert not re.search(r"//\w|\bsrc=|\bhref=|@import|url\(|fetch\(|innerHTML", text)
    assert "<noscript>" in text
