"""The same whole requests by diffusers' WanPipeline, in a process of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wanrt.bench import peers
from wanrt.bench.e2e_case import DTYPES, Case, tell
from wanrt.clock import Clock, process_began


class Peer:
    """The pipeline, its text encoder and VAE as phases of the clock that runs."""

    def __init__(self, case: Case) -> None:
        self.case, self.clock = case, Clock()
        self.pipe = peers.diffusers_pipeline(
            case.model, DTYPES[case.dtype], case.vae_dtype, case.device, case.flow_shift
        )
        self.pipe.encode_prompt = self._phase("text", self.pipe.encode_prompt)
        self.pipe.vae.decode = self._phase("decode", self.pipe.vae.decode)
        processor = self.pipe.video_processor
        processor.postprocess_video = self._phase("decode", processor.postprocess_video)

    def _phase(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            with self.clock.phase(name):
                result = call(*args, **options)
                if self.case.device == "cuda":
                    torch.cuda.synchronize()
                return result

        return timed

    def generate(self, prompt: str) -> Tensor:
        """From the prompt to the file; returns the latents of the last step."""
        case, kept = self.case, {}

        def keep(pipe: object, step: int, t: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
            kept["latents"] = state["latents"]
            return state

        with self.clock.phase("denoise"):
            frames = self.pipe(
                prompt=prompt,
                negative_prompt=case.negative,
                width=case.width,
                height=case.height,
                num_frames=case.num_frames,
                num_inference_steps=case.num_steps,
                guidance_scale=case.guidance,
                latents=self._noise(),
                callback_on_step_end=keep,
            ).frames[0]
        with self.clock.phase("encode"):
            peers.diffusers_write(frames, case.video("diffusers"), case.fps)
        return kept["latents"]

    def _noise(self) -> Tensor:
        """The same as wanrt draws from this seed."""
        generator = torch.Generator().manual_seed(self.case.seed)
        return torch.randn(self.case.latent_shape, generator=generator).to(self.case.device)


def main() -> None:
    """One request in each state."""
    clock = Clock(process_began())
    peers.import_diffusers_requests()
    clock.rest("start")
    case = Case.of_process()
    peer = Peer(case)
    clock.rest("load")
    for state, prompt in case.requests.items():
        peer.clock = clock
        latents = peer.generate(prompt)
        tell(state, clock)
        case.keep_latents("diffusers", latents)
        clock = Clock()


if __name__ == "__main__":
    main()
