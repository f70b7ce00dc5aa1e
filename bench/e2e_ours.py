"""Whole requests of wanrt in a process of their own, as `wanrt generate` makes them."""

from wanrt.bench.e2e_case import Case, tell
from wanrt.cli import Clock, Marker, Marking, Pipeline  # so all is imported that a command imports
from wanrt.clock import process_began


def main() -> None:
    """One request in each state. The files are marked; the peer's are not."""
    clock = Clock(process_began())
    clock.rest("start")
    case = Case.of_process()
    marker = Marker(Marking("required"), clock)
    pipe = Pipeline.load(str(case.model), precision=case.dtype, device=case.device)
    clock.rest("open")
    for state, prompt in case.requests.items():
        marker.clock = clock
        run = pipe.start(
            prompt,
            clock=clock,
            negative=case.negative,
            width=case.width,
            height=case.height,
            num_frames=case.num_frames,
            fps=case.fps,
            num_steps=case.num_steps,
            guidance=case.guidance,
            flow_shift=case.flow_shift,
            seed=case.seed,
        )
        latents = pipe.denoise(run)
        marker.save(pipe.decode(run, latents), case.video("wanrt"), case.fps, overwrite=True)
        tell(state, clock)
        case.keep_latents("wanrt", latents)
        clock = Clock()


if __name__ == "__main__":
    main()
