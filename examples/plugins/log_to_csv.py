"""Writes the loss of every step to NAME-losses.csv beside the run's folder, and prints each checkpoint.

univitar-ds train --config photos 'plugins=[examples/plugins/log_to_csv.py]'
"""

from univitar_ds.plugins import Callback, register_callback


@register_callback
class LogToCsv(Callback):
    def on_start(self, run):
        self.path = run.folder.with_name(f"{run.name}-losses.csv")
        if run.step == 0:
            self.path.write_text("step,samples,loss\n", encoding="utf-8")

    def on_step(self, info):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{info.step},{info.samples},{info.loss:.6g}\n")

    def on_checkpoint(self, folder):
        print(f"checkpoint {folder.name} is complete", flush=True)

    def on_end(self, summary):
        print(f"{summary['steps']} steps in {summary['seconds']['training']} s", flush=True)
