"""What a run writes and shows while it lasts, on its main rank."""

from pathlib import Path

from megatron_rl.config import RunConfig
from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.metrics.console import Display, SilentDisplay, open_display
from megatron_rl.metrics.writers import MetricsWriter, open_writers
from megatron_rl.parallel.place import job_rank
from megatron_rl.types import IterationMetrics


def say_early(message: str) -> None:
    """Say a line before the display exists, on the first rank of the job."""
    if job_rank() == 0:
        print(message, flush=True)


class Recorder:
    """The metric writers and the display; silent on all ranks but the main one."""

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        self._config, self._is_main = config, is_main
        self._display: Display | None = None
        self._writers: list[MetricsWriter] = []

    def say(self, message: str) -> None:
        say = say_early if self._display is None else self._display.say
        say(message)

    def record(self, metrics: IterationMetrics) -> None:
        if self._display is None:
            self._open(metrics.iteration)
        assert self._display is not None
        for writer in self._writers:
            writer.write(metrics.iteration, metrics.values)
        self._display.write(metrics.iteration, metrics.values)

    def abandon(self) -> None:
        """Leave the terminal as it was; what was written stays."""
        if self._display is not None:
            self._display.close()

    def close(self, end: str, updates: int, exported: Path | None) -> None:
        for writer in self._writers:
            writer.close()
        if self._display is not None:
            self._display.close()
        if not self._is_main:
            return
        output = Path(self._config.run.output_dir)
        print(f"{end}: {updates} optimizer steps")
        if self._config.metrics.jsonl:
            from megatron_rl.metrics.plot import plot_run

            plot_run([(output.name, output / "metrics.jsonl")], output / "plot.png")
            print(f"  metrics    {output / 'metrics.jsonl'}")
            print(f"  curves     {output / 'plot.png'}")
        if exported is not None:
            print(f"  model      {exported} (Hugging Face)")

    def _open(self, first_iteration: int) -> None:
        """Open at the first record: only then is it known at which iteration the run goes on."""
        settings: MetricsConfig = self._config.metrics
        if not self._is_main:
            self._display = SilentDisplay()
            return
        done = max(first_iteration - 1, 0)
        self._display = open_display(
            settings.console, self._config.run.num_iterations, done_iterations=done
        )
        self._writers = open_writers(
            settings,
            Path(self._config.run.output_dir),
            last_iteration=first_iteration - 1 if first_iteration > 1 else None,
            run_settings=self._config.model_dump(mode="json"),
        )
