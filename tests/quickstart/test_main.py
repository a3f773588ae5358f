"""What ``make run`` says and writes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from deploy.quickstart import __main__ as quickstart
from deploy.quickstart.packages import QuickstartError
from server.wire import decode


@pytest.fixture
def request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "Ignore": 1, "all": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    return quickstart.write_request(tmp_path / "tokenizer.json", Path("request.json"))


def test_request_body_is_one_that_the_server_reads(request_file: Path) -> None:
    decoded = decode(request_file.read_bytes(), None, None)
    inputs = decoded.request.inputs
    assert inputs["input_ids"][0, :3].tolist() == [1, 2, 0]
    assert inputs["attention_mask"].shape == inputs["token_type_ids"].shape == inputs["input_ids"].shape
    assert decoded.request.outputs == ("logits",)


def test_printed_curl_line_can_be_pasted_anywhere(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "report_of", lambda name: Path("/models", name, "1", "report.html"))
    text = quickstart.how_to_use(8123, request_file)
    (line,) = (line for line in text.splitlines() if line.strip().startswith("curl"))
    assert f"@{request_file}" in line
    assert request_file.is_absolute()
    assert line.endswith("http://127.0.0.1:8123/v2/models/minilm-l6/infer")
    assert "file:///models/magika/1/report.html" in text
    assert "http://127.0.0.1:8123/docs" in text


def test_newest_report_is_the_highest_number(tmp_path: Path) -> None:
    for version in ("9", "10", "draft"):
        (tmp_path / "m" / version).mkdir(parents=True)
        (tmp_path / "m" / version / "report.html").touch()
    assert quickstart.report_of("m", tmp_path) == tmp_path / "m" / "10" / "report.html"
    with pytest.raises(QuickstartError, match="no version"):
        quickstart.report_of("other", tmp_path)


def test_taken_port_is_told_before_any_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = subprocess.run(
            [sys.executable, "-m", "deploy.quickstart", "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            cwd=quickstart.ROOT,
            stdin=subprocess.DEVNULL,
        )
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert outcome.stderr.startswith(f"Error: cannot listen on 127.0.0.1 port {port}: Address already in use; try: ")
    assert f"make run PORT={port + 1}" in outcome.stderr
    assert json.dumps(outcome.stderr).count("\\n") == 1


def test_failed_optimization_ends_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(quickstart, "slipstream", lambda: "false")
    with pytest.raises(QuickstartError, match="exit code 1"):
        quickstart.optimize(["optimize", "a model.onnx"])
    assert "$ slipstream optimize 'a model.onnx'" in capsys.readouterr().out
