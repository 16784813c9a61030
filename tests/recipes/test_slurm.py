"""The sbatch files, run by a SLURM of one machine (tests/helpers/slurm.py): real processes on the CPU."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import linked_environment
from tests.helpers.slurm import ROOT, Job
from w2vscale.checkpoint.verification import verify

SLURM = ROOT / "recipes" / "utils" / "slurm"
PER_GPU, PER_NODE, ARRAY = (SLURM / f"{name}.sbatch" for name in ("task_per_gpu", "task_per_node", "data_array"))

pytestmark = pytest.mark.distributed


def recipe(folder: Path, text: str) -> str:
    """A script in place of a recipe."""
    path = folder / "recipe.sh"
    path.write_text(f"set -euo pipefail\n{text}\n")
    return str(path)


class TestRequeueing:
    """What happens to a job, with commands that are no training."""

    @pytest.mark.parametrize(("code", "times"), [(0, 0), (1, 0), (2, 0), (75, 1), (137, 1), (138, 1), (143, 1)])
    def test_the_exit_code_decides(self, code: int, times: int, tmp_path: Path) -> None:
        with closing(Job(PER_GPU, recipe(tmp_path, f"exit {code}"), folder=tmp_path / "job")) as job:
            job.finish(code=code, seconds=60)
            assert job.requeued == times

    def test_the_launcher_is_slurm(self, tmp_path: Path) -> None:
        given = recipe(tmp_path, 'echo "$@"')
        with closing(Job(PER_GPU, given, "--corpus", "a b", folder=tmp_path / "gpu")) as job:
            assert job.finish(code=0, seconds=60) == "--launcher slurm --nproc 1 --corpus a b\n"
        with closing(Job(PER_NODE, given, folder=tmp_path / "node", SLURM_GPUS_ON_NODE="8")) as job:
            assert job.finish(code=0, seconds=60) == "--launcher slurm --nproc 8\n"

    @pytest.mark.parametrize(("code", "final", "times"), [(2, 2, 0), (1, 1, 0), (75, 143, 1), (0, 0, 0)])
    def test_a_user_error_of_one_task_counts_though_srun_kills_the_others(
        self, code: int, final: int, times: int, tmp_path: Path
    ) -> None:
        """The exit code of srun is then that of a killed task."""
        task = f'if [ "$SLURM_PROCID" = 1 ] || [ {code} = 0 ]; then exit {code}; fi; exec sleep 60'
        step = f"srun --kill-on-bad-exit=1 bash {SLURM}/task.sh \"$TASK_CODES\" sh -c '{task}'"
        with closing(Job(PER_GPU, recipe(tmp_path, step), folder=tmp_path / "job", tasks=(2, 1))) as job:
            job.finish(code=final, seconds=60)
            assert job.requeued == times
        assert not list(ROOT.glob(".slurm-*.codes"))

    def test_the_warning_reaches_the_tasks_and_the_job_is_put_back(self, tmp_path: Path) -> None:
        # As ranks do: when the first one has exited, srun sends SIGTERM to those that still save.
        task = 'trap "echo saved; exit 138" USR1 TERM; echo ready >>$FAKE_SLURM/ready; while :; do sleep 0.05; done'
        step = f"srun --kill-on-bad-exit=1 bash {SLURM}/task.sh \"$TASK_CODES\" bash -c '{task}'"
        with closing(Job(PER_GPU, recipe(tmp_path, step), folder=tmp_path / "job", tasks=(2,))) as job:
            job.wait_for(tmp_path / "job" / "ready", 2)
            job.warn()
            printed = job.finish(code=138, seconds=60)
            assert printed.count("saved") == 2
            assert job.requeued == 1

    def test_a_command_that_does_not_stop_is_put_back_before_the_time_limit(self, tmp_path: Path) -> None:
        text = (SLURM / "job.sh").read_text()
        assert "warning_seconds=100 " in text
        given = recipe(tmp_path, "touch $FAKE_SLURM/ready; echo >>$FAKE_SLURM/ready; sleep 3; exit 0")
        short = tmp_path / "short.sbatch"
        short.write_text(PER_GPU.read_text().replace("run_job 1", "warning_seconds=0.5; run_job 1"))
        with closing(Job(short, given, folder=tmp_path / "job")) as job:
            job.wait_for(tmp_path / "job" / "ready", 1)
            job.warn()
            assert "not finished in 0.5 s; putting it back" in job.finish(code=0, seconds=60)
            assert job.requeued == 1

    def test_a_job_is_not_put_back_for_ever(self, tmp_path: Path) -> None:
        with closing(Job(PER_GPU, recipe(tmp_path, "exit 137"), folder=tmp_path / "job", REQUEUES="1")) as job:
            job.process.wait(60)
            job.again()
            assert "not put back, because it was put back 1 times" in job.finish(code=137, seconds=60)
            assert job.requeued == 1

    def test_a_job_that_is_killed_each_time_is_not_put_back_for_ever(self, tmp_path: Path) -> None:
        given = recipe(tmp_path, "echo >>$FAKE_SLURM/tries; [ $(wc -l <$FAKE_SLURM/tries) = 2 ] && exit 75; exit 137")
        with closing(Job(PER_GPU, given, folder=tmp_path / "job")) as job:
            for times in range(1, 6):
                job.process.wait(60)
                assert job.requeued == times
                job.again()
            assert "exit code 137 for the 4th time in a row; not put back" in job.finish(code=137, seconds=60)
            assert job.requeued == 5
        assert not list(ROOT.glob(".slurm-*"))

    def test_a_job_outside_of_the_checkout_says_so(self, tmp_path: Path) -> None:
        with closing(Job(PER_GPU, "x.sh", folder=tmp_path / "job", SLURM_SUBMIT_DIR=str(tmp_path))) as job:
            assert job.finish(code=2, seconds=60) == f"{tmp_path}: not the checkout of w2vscale; run sbatch there\n"

    def test_a_job_without_a_command_says_so(self, tmp_path: Path) -> None:
        with closing(Job(PER_GPU, folder=tmp_path / "job")) as job:
            assert "nothing to run: give a recipe" in job.finish(code=2, seconds=60)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The environment of the tests in place of .venv/, which path.sh sets up."""
    if not (Path(sys.prefix) / ".w2vscale-setup").is_file():
        pytest.skip("recipes run in the environment that tools/setup.sh makes, and this is another")
    folder = tmp_path_factory.mktemp("environment") / "venv"
    linked_environment(folder)
    return str(folder)


@pytest.mark.slow
def test_an_array_writes_and_checks_all_parts(environment: str, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """All tasks of an array at the same time."""
    shards = tmp_path / "shar"
    writing = ("shar", str(small_corpus.train), str(shards), "--shard-size", "4")
    for number, command in enumerate((writing, ("validate", str(small_corpus.train)))):
        with ExitStack() as stack:
            jobs = [
                stack.enter_context(closing(Job(
                    ARRAY, "data", *command, folder=tmp_path / f"job-{number}-{task}", W2VSCALE_VENV=environment,
                    SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT="2", SLURM_CPUS_PER_TASK="1",
                )))
                for task in (1, 2)
            ]  # fmt: skip
            printed = [job.finish(code=0, seconds=100) for job in jobs]
        assert all("12 utterances" in one for one in printed), printed
    assert len(list(shards.glob("cuts.*.jsonl.gz"))) == 6


def curve(exp: Path) -> dict[int, float]:
    lines = map(json.loads, (exp / "metrics.jsonl").read_text().splitlines())
    return {line["update"]: line["loss"] for line in lines if "loss" in line}


UPDATES = 16


def training(corpus: SmallCorpus, exp: Path) -> list[str]:
    settings = (*MICRO_RUN, f"trainer.updates={UPDATES}", "checkpoint.every=1000", f"data.train={corpus.train}")
    return ["train", "base", *settings, "--exp", str(exp)]


CASES = [
    # The file, the tasks on each machine, processes per task, and whether each task sees a GPU of its own.
    pytest.param(PER_GPU, (3, 1), "1", "one", id="per-gpu"),
    pytest.param(PER_NODE, (1, 1), "2", "none", id="per-node"),
]


@pytest.fixture(scope="module")
def untouched(
    environment: str, small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    """The curve of a run on one process of one task."""
    folder = tmp_path_factory.mktemp("untouched")
    arguments = training(small_corpus, folder / "exp")
    with closing(Job(PER_GPU, *arguments, folder=folder / "job", W2VSCALE_VENV=environment)) as job:
        job.finish(code=0)
        assert job.requeued == 0
    return curve(folder / "exp")


@pytest.mark.long
class TestTraining:
    @pytest.mark.parametrize(("script", "tasks", "processes", "gpus"), CASES)
    def test_a_warned_job_saves_and_continues_after_requeueing(
        self,
        script: Path,
        tasks: tuple[int, ...],
        processes: str,
        gpus: str,
        environment: str,
        untouched: dict[int, float],
        small_corpus: SmallCorpus,
        tmp_path: Path,
    ) -> None:
        exp = tmp_path / "exp"
        arguments = training(small_corpus, exp)
        given = {"W2VSCALE_VENV": environment, "NPROC": processes, "FAKE_SLURM_GPUS": gpus, "SLURM_CPUS_PER_TASK": "1"}
        with closing(Job(script, *arguments, folder=tmp_path / "job", tasks=tasks, **given)) as job:
            job.wait_for(exp / "metrics.jsonl", 3)
            job.warn()
            # When the first rank exits, srun kills those that have saved and not yet exited.
            printed = job.finish(code=(138, 143))
            assert job.requeued == 1
            assert "stopped by SIGUSR1; the same command continues from here" in printed
            assert verify(exp).problems == []
            stopped = max(curve(exp))
            assert stopped < UPDATES

            job.again()
            printed = job.finish(code=0)
            assert job.requeued == 1
            assert f"resumed from {exp}/checkpoints/update_{stopped:08d}" in printed
        assert curve(exp) == pytest.approx(untouched, rel=1e-5)
        assert all("--cpus-per-task=1" in step for step in job.steps) and len(job.steps) == 2

    def test_a_wrong_setting_is_not_tried_again(
        self, environment: str, small_corpus: SmallCorpus, tmp_path: Path
    ) -> None:
        arguments = [*training(small_corpus, tmp_path / "exp"), "optim.lr=fast"]
        with closing(Job(PER_GPU, *arguments, folder=tmp_path / "job", tasks=(2,), W2VSCALE_VENV=environment)) as job:
            assert "error: override: optim.lr='fast'" in job.finish(code=2)
            assert job.requeued == 0

    def test_a_recipe_runs_its_stages_in_a_job(self, environment: str, tmp_path: Path) -> None:
        """Data preparation in the batch script, training and decoding in the tasks."""
        from tests.recipes.test_recipes import SHORT, SMALL_BATCH, TUNING, write_librispeech

        write_librispeech(tmp_path / "corpus")
        options = (
            "--corpus", str(tmp_path / "corpus"), "--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"),
            "--minutes", "0.2", "--jobs", "1", "--stop-stage", "8",
            "--finetune-settings", f"{TUNING} batch.micro_batches=2",
        )  # fmt: skip
        settings = (*SHORT, *SMALL_BATCH, "batch.micro_batches=2")
        given = (str(ROOT / "recipes" / "mini_librispeech" / "run.sh"), *options, *settings)
        with closing(Job(PER_GPU, *given, folder=tmp_path / "job", tasks=(2,), W2VSCALE_VENV=environment)) as job:
            printed = job.finish(code=0, seconds=280)
            for number in (1, 2, 4, 5, 6, 7, 8):
                assert f"stage {number}: done in" in printed
            words = [step.split(f"{environment}/bin/w2vscale ")[1].split()[0] for step in job.steps]
        assert words == ["train", "finetune", "finetune", "evaluate", "evaluate"]
