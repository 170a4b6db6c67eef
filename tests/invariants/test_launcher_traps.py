"""Ways to launch that silently train something else; each is refused, or really does what was
asked.
"""

import pytest

ON_CPU = "use_cpu: true\nnum_machines: 1\nmain_process_port: 0\n"
SHORT = ("train.max_steps=1", "train.eval_strategy='no'")


@pytest.mark.slow
def test_multi_gpu_on_a_cpu_trains_once_on_two_ranks_not_twice(launcher, tmp_path) -> None:
    config = tmp_path / "multi_gpu.yaml"
    ranks = "distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: 'no'\n"
    config.write_text(ranks + ON_CPU)
    said = launcher.train("run.name=trap-gpu", *SHORT, config=config)
    assert said.count("DDP, world size 2") == 1 and said.count("step 1/1  loss") == 1


@pytest.mark.nightly
def test_what_accelerate_starts_otherwise_than_it_was_asked_is_refused(launcher) -> None:
    """With the real command: who started a process is read from the process table."""
    command = launcher.command("run.name=trap", *SHORT, config="cpu")
    command[2:4] = ["--cpu", "--num_processes", "2"]
    code, said = launcher.wait(launcher.start_really(command))
    asked = "2 processes were requested, but accelerate launch started 1"
    assert code != 0 and said.count(asked) == 1, said[-3000:]
    assert not launcher.run("trap").exists()


@pytest.mark.slow
def test_a_precision_that_the_recipe_does_not_have_is_refused(launcher, tmp_path) -> None:
    """accelerate's word wins over `train.bf16: false`."""
    config = tmp_path / "foreign.yaml"
    half = "distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: bf16\n"
    config.write_text(half + ON_CPU)
    code, said = launcher.start("run.name=trap-precision", *SHORT, config=config).wait()
    assert code != 0 and "mixed_precision bf16, but the recipe for no" in said, said[-3000:]
    assert "internal error" not in said and not launcher.run("trap-precision").exists()
