"""transformers' own tests of X-CLIP, with its models accelerated: the same outcome of every test.

    XCLIP_FAST_TRANSFORMERS=~/transformers python -m pytest -n 0 -s tests/huggingface/test_transformers_suite.py

The folder is a checkout of transformers at the installed version: no wheel or source distribution has its tests. They
take eight minutes on a busy core and need ``pip install parameterized httpx datasets``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT = os.environ.get("XCLIP_FAST_TRANSFORMERS")
TESTS = "tests/models/x_clip/test_modeling_x_clip.py"


def outcomes(report):
    """The outcome of each test: "passed", or "failure", "error", "skipped"."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        reasons = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        found[case.get("classname"), case.get("name")] = reasons[0] if reasons else "passed"
    return found


@pytest.mark.skipif(CHECKOUT is None, reason="XCLIP_FAST_TRANSFORMERS names no checkout of transformers")
def test_accelerated_models_pass_the_tests_that_stock_models_pass(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    found = {}
    for kind, plugin in (("stock", ()), ("accelerated", ("-p", "accelerated_plugin"))):
        report = tmp_path / f"{kind}.xml"
        command = [sys.executable, "-m", "pytest", "-q", *plugin, TESTS, f"--junitxml={report}"]
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        assert report.exists(), done.stdout + done.stderr
        found[kind] = outcomes(report)
    count = int(re.search(r"accelerated models: (\d+)", done.stdout).group(1))
    passed = list(found["stock"].values()).count("passed")
    print(f"{passed} of {len(found['stock'])} tests pass with stock models; {count} models accelerated")
    assert passed > 100
    assert count > 100
    assert found["accelerated"] == found["stock"]
