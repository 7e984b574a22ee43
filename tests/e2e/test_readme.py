"""Every command of the README, run as it stands there, in order, by a stranger who has its files and nothing else.

What this machine does not have is stood for by something it has, and what is run by other tests is named.
"""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModel

from qa_dist.config import SyntheticConfig
from qa_dist.config_sources import leaves
from qa_dist.tasks.question_answering import synthetic
from tests.e2e.test_token_classification import write_columns
from tests.helpers import ROOT, SIZES, environment, squad
from tests.hub_server import HubServer
from tests.slurm_cluster import SlurmCluster, missing
from tests.tokenizers import wordpiece_tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ("bert-base-uncased", "bert-large-uncased", "bert-base-cased")

STANDS_FOR = {
    "--config_file zero2": "--config_file cpu_zero2",
    "configs/accelerate/zero2.yaml": "configs/accelerate/cpu_zero2.yaml",
    "LAUNCH.yaml": "configs/accelerate/cpu_zero2.yaml",
    "--gpus-per-node=8 --exclusive --time=4:00:00": "--time=10 --signal=B:USR1@60",
    "--num_processes 16": "--num_processes 2",
    "--main_process_ip node0": "--main_process_ip 127.0.0.1",
    "HF_TOKEN=…": "HF_TOKEN=hf_alice",
    "user/name": "alice/model",
    "configs/bert_base_squad.yaml": "bert_base_squad.yaml",  # with the data set from this disk
    "--port 8000": "--port 0",
    "tail -f": "tail",
}
ELSEWHERE = {
    "launch/demo.sh": "tests/e2e/test_training.py runs what it starts, and checks the table",
    "launch/test.sh": "runs these tests",
    "launch/install.sh && source .venv/bin/activate": ".ci/run installs so",
    "qa_dist/launch/install.sh": ".ci/run installs so",
    "launch/install.sh test dev": ".ci/run installs so",
    "launch/check.sh": "a stage of .ci/run",
    "launch/test.sh --fast": "runs these tests",
    ".ci/run": "runs these tests",
    "pre-commit install": "writes into .git",
}


def commands() -> list[str]:
    """In the order of the README; lines that go on joined, comments left out."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if command:
                found.append(command)
    return found


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


class Stranger:
    """A directory with the README's files, and the machine around it."""

    def __init__(self, directory: Path, hub: HubServer):
        self.directory, self.hub = directory, hub
        self.cluster: SlurmCluster | None = None
        self.exported: dict[str, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "PATH": f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.directory / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "LAUNCH_CONFIG": "cpu_zero2",
        }
        slurm: Mapping[str, str] = self.cluster.environment if self.cluster else {}
        return environment() | dict(slurm) | own | self.exported

    def type(self, command: str, seconds: float = 120) -> str:
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command],
            cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout}"
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def serve(self, command: str) -> None:
        """Until its page has come."""
        process = subprocess.Popen(
            command.split(), cwd=self.directory, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        try:
            url = process.stdout.readline().split()[0]
            assert "qa_dist" in self.type(f"curl -sf {url}/" if shutil.which("curl") else f"wget -qO- {url}/")
        finally:
            process.terminate()
            process.wait(timeout=20)
            process.stdout.close()

    def make_room(self, command: str) -> None:
        """Commands of different sections that name the same run, or repository, are not meant to follow each other."""
        for run in ("runs/RUN", "runs/qa_dist"):
            if "train" in command or command.startswith("sbatch"):
                shutil.rmtree(self.directory / run, ignore_errors=True)
        if "--hub.repo_id" in command and "train" in command and self.hub.store.get("alice/model"):
            self.hub.delete_repo("alice/model")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    directory = tmp_path_factory.mktemp("stranger")
    for name in ("launch", "configs", ".venv"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "qa_dist").symlink_to(ROOT)  # a clone: no Python may take its directory for the package
    _write_data(directory)
    with HubServer(directory / "hub") as hub:
        _fill(hub, directory)
        stranger = Stranger(directory, hub)
        stranger.type("qa-dist train --config RUN.yaml --run.output_dir runs/demo")
        (directory / "predictions.json").write_text((directory / "runs/demo/predictions.json").read_text())
        yield stranger


def _write_data(directory: Path) -> None:
    examples = synthetic.generate(SyntheticConfig(train_examples=24, long_share=0.1, seed=4), "train")
    rows = [
        {
            "id": example.id,
            "question": example.question,
            "context": example.context,
            "answers": [
                {"text": text, "answer_start": start}
                for text, start in zip(example.answers, example.answer_starts, strict=True)
            ],
        }
        for example in examples
    ]
    for name in ("train", "dev", "test"):
        (directory / f"{name}.json").write_text(json.dumps(squad(rows)))
    (directory / "context.txt").write_text(examples[0].context)
    questions = [{"question": example.question, "context": example.context} for example in examples[:3]]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (directory / "RUN.yaml").write_text(
        "data: {train_file: train.json, validation_file: dev.json}\n"
        "model: {name: google-bert/bert-base-uncased}\n"
        "train: {epochs: 1, global_batch_size: 8}\nrun: {log_every: 1}\n"
    )
    for name, content in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        (directory / name).write_text(content)
    for name, tagged in (("train", True), ("dev", True), ("words", False)):
        write_columns(directory / f"{name}.conll", "train", 24, tagged=tagged)
    flat = Dataset.from_list(
        [{**row, "answers": {"text": [a["text"] for a in row["answers"]],
                             "answer_start": [a["answer_start"] for a in row["answers"]]}} for row in rows]
    )  # fmt: skip
    DatasetDict({"train": flat, "validation": flat}).save_to_disk(directory / "squad")
    recipe = (ROOT / "configs/bert_base_squad.yaml").read_text()
    (directory / "bert_base_squad.yaml").write_text(recipe.replace("rajpurkar/squad", "./squad"))


def _fill(hub: HubServer, directory: Path) -> None:
    """With small models of the README's names."""
    tokenizer = wordpiece_tokenizer([(directory / "train.json").read_text()])
    torch.manual_seed(3)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **{**SIZES, "max_position_embeddings": 512})
    AutoModel.from_config(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    files: dict[str, bytes | None] = {path.name: path.read_bytes() for path in (directory / "model").iterdir()}
    for name in MODELS:
        hub.store.create(f"google-bert/{name}", private=False, author="alice").commit_as("alice", files)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), slurmd_timeout=6) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(command for command in commands() if command not in ELSEWHERE))
def test_a_command(command: str, stranger: Stranger, request: pytest.FixtureRequest):
    for what, stand_in in STANDS_FOR.items():
        command = command.replace(what, stand_in)
    if "step_00000281" in command:
        newest = max((stranger.directory / "runs/demo/checkpoints").iterdir())
        command = command.replace("step_00000281", newest.name)
    stranger.make_room(command)
    if command.startswith("export "):
        name, _, value = command.removeprefix("export ").partition("=")
        stranger.exported[name] = value
    elif command.startswith("qa-dist serve"):
        stranger.serve(command)
    elif command.startswith("sbatch"):
        if missing():
            pytest.skip(f"SLURM: {missing()}")
        stranger.cluster = cluster = request.getfixturevalue("cluster")
        job = int(stranger.type(command).split()[-1])
        cluster.wait(job, {"COMPLETED"}, timeout=120)
    elif "--machine_rank 0" in command:
        ours = command.replace("29500", free_port())
        theirs = ours.replace("--machine_rank 0", "--machine_rank 1")
        stranger.type(f"{theirs} & {ours} && wait $!", 180)
    elif "slurm-qa_dist" in command and missing():
        pytest.skip(f"SLURM: {missing()}")
    else:
        stranger.type(command)


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("block", python_blocks())
def test_a_python_example(block: str, stranger: Stranger):
    (stranger.directory / "example.py").write_text(block)
    assert stranger.type("python example.py").strip()


def test_all_that_stands_elsewhere_or_for_something_is_in_the_readme():
    assert ELSEWHERE.keys() <= set(commands())
    text = "\n".join(commands())
    assert [what for what in STANDS_FOR if what not in text] == []


def test_every_setting_that_is_named_exists():
    known = {key for key, _ in leaves()}
    sections = {key.split(".")[0] for key in known if "." in key}
    named = re.findall(rf"`-{{0,2}}((?:{'|'.join(sections)})\.[a-z0-9_.]+)", README.partition("## Settings")[0])
    named += re.findall(rf"--((?:{'|'.join(sections)})\.[a-z0-9_.]+)", README)
    files = {"predictions.json", "metrics.json"}
    assert len(named) > 50
    assert {name for name in named if name not in known and not name.endswith((".py", ".json", ".yaml"))} <= files


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
