"""READ FIRST: a prompt becomes a video. Encode, denoise, decode; what is freed in between."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanrt import sampler
from wanrt.components import Components, Report, choose_device, open_parts
from wanrt.conditions import Conditions, make_conditions, noise_shape, prepare_inputs
from wanrt.config import GenerateConfig, Precision
from wanrt.errors import NumericsError, UsageError
from wanrt.guidance import expert_for, guidance_for, guide
from wanrt.media.image import to_uint8
from wanrt.media.result import Video
from wanrt.request import Request, resolve
from wanrt.weights.hub import resolve_model
from wanrt.weights.parts import find_parts

log = logging.getLogger("wanrt")


class Step(NamedTuple):
    """What a per-step callback sees; latents are those after the step, `[1, C, T, h, w]` fp32."""

    index: int
    num_steps: int
    t: float
    sigma: float
    latents: Tensor


OnStep = Callable[[Step], None]


@dataclass
class Run:
    """One request on its way: what was resolved, what conditions it, how long each phase took."""

    request: Request
    conditions: Conditions
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timings[phase] = self.timings.get(phase, 0.0) + time.perf_counter() - begin


class Pipeline:
    """A Wan model and everything around it. Parts are loaded when first needed."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.spec = components.spec
        self._embeds: dict[str, Tensor] = {}  # prompt -> [n, text_dim], for the next request

    @classmethod
    def load(
        cls,
        model: str = "nano",
        *,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        clip: str | Path | None = None,
        low_noise: str | Path | None = None,
        precision: Precision = "auto",
        device: str = "auto",
        offline: bool = False,
        check: bool = True,
        report: Report = lambda phase, done, total: None,
    ) -> "Pipeline":
        """Open a model: an id, a directory, a file, a repository id or a ComfyUI `models/` folder.

        Reads headers only; `check` looks for NaN and infinity when a part is loaded. `report` is
        called as (phase, done, total) while parts load and frames decode.
        """
        path = resolve_model(model, offline=offline)
        parts = find_parts(path, text_encoder=text_encoder, vae=vae, clip=clip, low_noise=low_noise)
        name = f"{model} {path}"
        return cls(open_parts(parts, name, precision, choose_device(device), check, report))

    def generate(
        self,
        prompt: str,
        *,
        output: str = "video",
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_embeds: Tensor | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Video | Tensor:
        """Make one video; `settings` are the fields of GenerateConfig.

        latents: noise to start from, `[1, C, T, h, w]`; prompt_embeds, negative_embeds: text
        features `[n <= 512, text_dim]` instead of the prompts. output="latents" returns the
        normalised latents and decodes nothing.
        """
        if output not in ("video", "latents"):
            raise UsageError(f"output {output!r} does not exist; choose 'video' or 'latents'")
        run = self.start(prompt, prompt_embeds, negative_embeds, **settings)
        result = self.denoise(run, latents, on_step)
        if output == "latents":
            return result
        frames = np.concatenate(list(self.decode(run, result)))
        return Video(frames, run.request.fps, asdict(run.request), run.timings)

    def stream(self, prompt: str, *, on_step: OnStep | None = None, **settings: Any) -> Iterator[np.ndarray]:
        """As generate, but yields uint8 frames `[n, H, W, 3]` as the VAE makes them."""
        latents = settings.pop("latents", None)
        run = self.start(prompt, settings.pop("prompt_embeds", None), **settings)
        yield from self.decode(run, self.denoise(run, latents, on_step))

    @torch.inference_mode()
    def start(
        self,
        prompt: str,
        prompt_embeds: Tensor | None = None,
        negative_embeds: Tensor | None = None,
        **settings: Any,
    ) -> Run:
        """Check everything, then compute all that does not change from step to step."""
        config = GenerateConfig(prompt, **settings)
        request, inputs = prepare_inputs(config, self.check(config), self.spec)
        begin = time.perf_counter()
        given = (prompt_embeds, negative_embeds)
        self.encode_prompts([p for p, e in zip(request.prompts, given, strict=False) if e is None])
        encoded = time.perf_counter()
        context = self._context(prompt_embeds, request.prompt)
        negative = self._context(negative_embeds, request.negative) if request.guided else None
        conditions = make_conditions(request, inputs, context, negative, self.components)
        run = Run(request, conditions)
        run.timings["text"] = encoded - begin
        run.timings["conditions"] = time.perf_counter() - encoded
        return run

    def check(self, config: GenerateConfig) -> Request:
        """The request with every default filled in; raises UsageError before any work is done."""
        return resolve(config, self.spec)

    @torch.inference_mode()
    def encode_prompts(self, prompts: list[str]) -> None:
        """Text features of every prompt not seen yet; afterwards the text encoder is let go."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._embeds]
        if not new:
            return
        parts = self.components
        tokenizer, umt5 = parts.tokenizer(), parts.umt5()
        for prompt in new:
            tokens = tokenizer([prompt], self.spec.dit.text_len)
            for cut in tokens.truncated:
                log.warning(
                    "the prompt has %d tokens; the model reads the first %d",
                    cut.num_tokens,
                    self.spec.dit.text_len,
                )
            features = umt5(tokens.ids.to(parts.device), tokens.mask.to(parts.device))
            self._embeds[prompt] = features[0].float()
        parts.release("umt5")

    def _context(self, embeds: Tensor | None, prompt: str) -> Tensor:
        """`[1, 512, text_dim]`: real rows, then rows of zeros, as the reference pads."""
        rows = self._embeds[prompt] if embeds is None else embeds.reshape(-1, embeds.shape[-1])
        dit = self.spec.dit
        if rows.shape[0] > dit.text_len or rows.shape[1] != dit.text_dim:
            raise UsageError(
                f"prompt embeddings are {tuple(rows.shape)}; {self.spec.title} takes at most "
                f"{dit.text_len} rows of width {dit.text_dim}"
            )
        context = torch.zeros(1, dit.text_len, dit.text_dim, device=self.components.device)
        context[0, : rows.shape[0]] = rows
        return context

    @torch.inference_mode()
    def denoise(self, run: Run, latents: Tensor | None = None, on_step: OnStep | None = None) -> Tensor:
        """Noise to latents: the loop over the schedule, `[1, C, T, h, w]` fp32."""
        request, conditions, spec = run.request, run.conditions, self.spec
        timesteps, sigmas = self._schedule(request)
        solver = sampler.make_solver(request.solver, sigmas)
        x = self._noise(request, conditions) if latents is None else latents
        x = conditions.impose(x.to(self.components.device, torch.float32))
        expert = None
        for i, t in enumerate(timesteps.tolist()):
            if expert_for(t, spec.boundary) != expert:
                with run.timed("load"):
                    expert = expert_for(t, spec.boundary)
                    dit = self.components.dit(expert)
                    text, no_text = conditions.prepare(dit)
            with run.timed("denoise"):
                inputs = conditions.step_inputs(t)
                cond = dit(x, inputs.t, text, **inputs.extra)
                guidance = guidance_for(expert, request.guidance, request.guidance_low)
                uncond = dit(x, inputs.t, no_text, **inputs.extra) if no_text is not None else None
                x = conditions.impose(solver.step(guide(cond, uncond, guidance), x))
            if not torch.isfinite(x).all():
                raise NumericsError(
                    f"step {i + 1} of {len(timesteps)} gave NaN or infinity; try --precision fp32"
                )
            if on_step is not None:
                on_step(Step(i, len(timesteps), t, float(sigmas[i]), x))
        self.components.release("dit", "dit_low")
        return x[:, :, conditions.num_refs :]

    def _schedule(self, request: Request) -> sampler.Schedule:
        if request.distilled:
            count = request.num_steps
            steps = [round(1000 * (1 - i / count)) for i in range(count)]
            return sampler.distilled_schedule(steps, request.flow_shift)
        return sampler.schedule(request.solver, request.num_steps, request.flow_shift)

    def _noise(self, request: Request, conditions: Conditions) -> Tensor:
        """fp32 noise of the request's seed, drawn on the CPU or, as the reference does, on CUDA."""
        device = torch.device(request.noise)
        if device.type == "cuda" and self.components.device.type != "cuda":
            raise UsageError("noise 'cuda' needs a CUDA GPU; 'cpu' is the same on every machine")
        generator = torch.Generator(device).manual_seed(request.seed)
        shape = noise_shape(request, self.spec, conditions.num_refs)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    @torch.inference_mode()
    def decode(self, run: Run, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents to uint8 frames `[n, H, W, 3]`, a chunk at a time, so memory does not grow."""
        report, total = self.components.report, latents.shape[2]
        with run.timed("load"):
            vae = self.components.vae()
        chunks = vae.decode_chunks(latents.to(self.components.device), chunk=1)
        for done in range(total):
            with run.timed("decode"):
                frames, _ = next(chunks)
                pixels = to_uint8(frames[0]).cpu().numpy()
            report("decode", done + 1, total)
            yield pixels
        self.components.release("vae")
