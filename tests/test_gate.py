"""Nothing dangerous and nothing of one machine is in the repository: unpickling, shells, local paths, index hosts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"affekt", "data", "pretrain", "finetune", "launch", "benchmarks"}
# What torch.distributed sends as pickles.
OBJECT_COLLECTIVES = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SAFE_YAML = {"yaml.safe_load", "yaml.safe_load_all", "yaml.safe_dump"}
LOCAL_PATH = re.compile(r"(?<![\w.<])/(?:work|tmp|home|root|opt|mnt|scratch|Users)/[\w.-]")
INDEX_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.org|crates\.io|ghcr\.io|quay\.io|docker\.io"
    r"|--(?:extra-)?index-url|--find-links"
)


def dangers(source: str) -> list[str]:
    """What the house forbids in `source`, each as `line: call`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            found += [f"{node.lineno}: from {node.module} import {alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _is_dangerous(node):
            found.append(f"{node.lineno}: {ast.unparse(node)[:100]}")
    return found


def _is_dangerous(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    root, _, method = name.rpartition(".")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        (root in UNPICKLERS and method in {"load", "loads", "open", "Unpickler"})
        or (name == "torch.load" and keywords.get("weights_only") != "True")
        or (root == "yaml" and method != "dump" and "load" in method and name not in SAFE_YAML)
        or name in {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput"}
        or keywords.get("shell", "False") != "False"
        or method == "extractall"
        or OBJECT_COLLECTIVES.fullmatch(method)
        or keywords.get("allow_pickle", "False") != "False"
    )


def pipe_urls(source: str) -> list[str]:
    """Strings that webdataset or ffmpeg would hand to a shell or a pipe."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [f"{node.lineno}: {node.value}" for node in nodes if isinstance(node.value, str) and "pipe:" in node.value]


def machine_traces(text: str) -> list[str]:
    """Absolute paths of one machine, and hosts or options that choose a package index."""
    lines = enumerate(text.splitlines(), 1)
    return [
        f"{number}: {line.strip()[:100]}"
        for number, line in lines
        if LOCAL_PATH.search(line) or INDEX_HOST.search(line)
    ]


def test_no_dangerous_call(repository_files):
    complaints = []
    for path in repository_files(".py"):
        source = path.read_text(encoding="utf-8")
        found = dangers(source)
        if path.relative_to(ROOT).parts[0] in SHIPPED:
            found += pipe_urls(source)
        complaints += [f"{path.relative_to(ROOT)}:{item}" for item in found]
    assert not complaints, "\n".join(complaints)


def test_no_trace_of_one_machine(repository_files):
    complaints = []
    for path in repository_files(tracked=True):
        if path.name == Path(__file__).name:
            continue  # the patterns themselves stand here
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or another binary file
        complaints += [f"{path.relative_to(ROOT)}:{item}" for item in machine_traces(text)]
    assert not complaints, "\n".join(complaints)


def test_no_weights_and_no_media_are_committed(repository_files):
    refused = {".safetensors", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".npy", ".mp4", ".flac", ".wav", ".tar", ".whl"}
    assert not repository_files(*refused, tracked=True)


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "from pickle import loads",
        "joblib.load(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "dist.all_gather_object(values, value)",
        "dist.broadcast_object_list(values)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_gate_sees(source):
    assert dangers(f"def f():\n    {source}\n")


def test_the_gate_lets_the_safe_twins_through():
    assert not dangers("torch.load(p, weights_only=True); yaml.safe_load(t); model.eval()")
    assert not dangers("np.load(p, allow_pickle=False); tar.extract(m, filter='data'); subprocess.run(['ls'])")
    assert pipe_urls("url = 'pipe:cat shard.tar'") and not pipe_urls("name = 'pipeline'")


@pytest.mark.parametrize("line", ["cd /home/someone/clips", "see '/tmp/x.log'", "pip install --index-url somewhere"])
def test_the_gate_sees_traces(line):
    assert machine_traces(line)
    assert not machine_traces("python demo.py path/to/work/x https://example.org/tmp/x ~/clips")
