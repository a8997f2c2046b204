"""How much does it pay to let malloc keep its memory while training on a CPU?

Trains patt_lite at 96 px, batch 32, one thread, with glibc's defaults and with what `World` sets, each in a
process of its own, in turns. Prints images per second of CPU time (user + system), page faults per step, and
the ratio. Run: python -m benchmarks.cpu_malloc
"""

import platform
import resource
import subprocess
import sys

STEPS, WARM_UP, BATCH, TURNS = 12, 6, 32, 3


def measure(keep: bool) -> tuple[float, float]:
    """Images per CPU second, and page faults per step."""
    import torch

    from fer_dist.config import ModelConfig
    from fer_dist.device import keep_freed_memory
    from fer_dist.models import build_model
    from fer_dist.spec import LabelSet

    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    model = build_model(ModelConfig(pretrained=False, image_size=96), 48, LabelSet())
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.rand(BATCH, 1, 48, 48) * 255, torch.randint(0, 7, (BATCH,))
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            before = resource.getrusage(resource.RUSAGE_SELF)
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return STEPS * BATCH / seconds, (after.ru_minflt - before.ru_minflt) / STEPS


def main() -> None:
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1] == "keep"))
        return
    best: dict[str, tuple[float, float]] = {}
    for _ in range(TURNS):
        for how in ("default", "keep"):
            done = subprocess.run([sys.executable, __file__, how], capture_output=True, text=True, check=True)
            speed, faults = map(float, done.stdout.split())
            best[how] = max(best.get(how, (0.0, 0.0)), (speed, faults))
            print(f"{how:8} {speed:6.0f} images per CPU second, {faults:8.0f} page faults per step")
    print(f"ratio of the best: {best['keep'][0] / best['default'][0]:.2f} on {platform.platform()}")


if __name__ == "__main__":
    main()
