"""READ FIRST: a prompt becomes a video. Encode, denoise, decode; what is freed in between."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wanrt import sampler
from wanrt.budgeted import make_vae_safer, plan_request, up_to_date, within_memory
from wanrt.clock import Clock
from wanrt.components import Components, Report, choose_device, open_parts
from wanrt.conditions import (
    Conditions,
    Text,
    make_conditions,
    noise_shape,
    origin_of,
    prepare_inputs,
)
from wanrt.config import GenerateConfig, Lora, Precision, VaePrecision, VaeWork
from wanrt.denoiser import Denoiser, schedule_of
from wanrt.engine.manifest import is_bundle
from wanrt.errors import UsageError
from wanrt.guidance import expert_for, guidance_for, guide
from wanrt.media.image import to_uint8
from wanrt.media.marking import UNKNOWN, Origin
from wanrt.media.result import Video
from wanrt.memory.plan import Plan
from wanrt.planning import UNLIMITED, Budgets
from wanrt.presets import hint_at_preset, parse_loras
from wanrt.request import Request, check_embeds, resolve
from wanrt.watch import healthy
from wanrt.weights.hub import resolve_model
from wanrt.weights.parts import find_parts

log = logging.getLogger("wanrt")

MAX_KEPT_PROMPTS = 128  # text features kept for later requests; a long prompt's are 8 MB


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
    """One request on its way: what was resolved, what conditions it, where its seconds went."""

    request: Request
    conditions: Conditions
    plan: Plan | None = None
    origin: Origin = UNKNOWN
    clock: Clock = field(default_factory=Clock)
    steps: list[float] = field(default_factory=list)  # seconds of each


class Pipeline:
    """A Wan model and everything around it. Parts are loaded when first needed."""

    def __init__(self, components: Components, budgets: Budgets = UNLIMITED) -> None:
        self.components, self.budgets = components, budgets
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
        vae_precision: VaePrecision = "auto",
        device: str = "auto",
        vram: str | int | None = None,
        ram: str | int | None = None,
        loras: Sequence[str | Path | Lora] = (),
        engine: str = "native",
        bundle: str | Path | None = None,
        offline: bool = False,
        check: bool = True,
        report: Report = lambda phase, done, total: None,
    ) -> "Pipeline":
        """Open a model: an id, a directory, a file, a repository id or a ComfyUI `models/` folder.

        vram, ram: budgets in GiB, as "8G": of the device, and of host memory for weights that wait
        there. Without vram a CUDA card's free memory is the budget, and a CPU has none.
        vae_precision: "auto" leaves the VAE as the device has it, or int8 as its file does.
        loras: "FILE:WEIGHT", paths or wanrt.Lora, which every request then has; where weights lie
        on the device they merge. For weights that change from request to request see `generate`.
        engine: "onnxruntime" computes with the graphs of a `bundle`, or of `model` where that is a
        bundle with weights; LoRAs then merge, and requests cannot bring their own.
        Reads headers only; `check` looks for NaN and infinity when a part is loaded. `report` is
        called as (phase, done, total) while parts load and frames decode.
        """
        budgets = Budgets.parse(vram, ram)
        path, found = resolve_model(model, offline=offline), choose_device(device)
        executor = None
        if engine != "native" or bundle is not None or is_bundle(path):
            from wanrt.engine import opened  # with the libraries of signatures

            executor = opened.open_engine(engine, bundle, path, found, vram, model)
        if is_bundle(path):
            parts = opened.model_in(path, executor)
        else:
            own = {"text_encoder": text_encoder, "vae": vae, "clip": clip, "low_noise": low_noise}
            parts = find_parts(path, **own)
        name = f"{model} {path} {parts.dit}"
        components = open_parts(
            parts, name, precision, found, check, report, executor, vae_precision
        )
        components.loras = parse_loras(loras)
        components.shelf.check(components.loras)
        components.check_loras(components.loras)
        return cls(components, budgets)

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

        loras=["FILE:WEIGHT", ...] among them act on this video alone, as side branches.
        latents: noise to start from, `[1, C, T, h, w]`; prompt_embeds, negative_embeds: text
        features `[n <= 512, text_dim]` instead of the prompts. output="latents" returns the
        normalised latents and decodes nothing.
        """
        if output not in ("video", "latents"):
            raise UsageError(f"output {output!r} does not exist; choose 'video' or 'latents'")
        decode = output == "video"
        run = self.start(prompt, prompt_embeds, negative_embeds, decode=decode, **settings)
        result = self.denoise(run, latents, on_step)
        if not decode:
            return result
        frames = np.concatenate(list(self.decode(run, result)))
        clock = run.clock
        measured = (clock.timings(), tuple(run.steps), clock.cold)
        return Video(frames, run.request.fps, asdict(run.request), *measured, run.origin)

    def stream(
        self, prompt: str, *, on_step: OnStep | None = None, **settings: Any
    ) -> Iterator[np.ndarray]:
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
        *,
        decode: bool = True,
        clock: Clock | None = None,
        **settings: Any,
    ) -> Run:
        """Check everything, then compute all that does not change from step to step.

        clock: one that runs already, where the request began before this.
        """
        clock = self.components.clock = clock or Clock()
        with clock.phase("prepare"):
            config = GenerateConfig(prompt, **settings)
            embeds = (prompt_embeds, negative_embeds)
            request = self.check(config, embeds, decode=decode)
            request, inputs = prepare_inputs(config, request, self.spec)
            plan = self.plan(request, embeds, refs=len(inputs.refs), decode=decode)
        with clock.phase("text"):
            self.encode_prompts(_without(embeds, request.prompts))
            text = self._text(prompt_embeds, request.prompt)
            negative = self._text(negative_embeds, request.negative) if request.guided else None
        with clock.phase("conditions"):
            conditions = make_conditions(request, inputs, text, negative, self.components)
            self.components.finish()
        return Run(request, conditions, plan, origin_of(config, request, self.spec), clock)

    def check(
        self,
        config: GenerateConfig,
        embeds: tuple[Tensor | None, ...] = (None, None),
        *,
        decode: bool = True,
    ) -> Request:
        """The request with every default filled in; reads no picture and no weights.

        embeds: text features given in place of the prompt and of the negative one. Raises
        UsageError, and FormatError where the model lacks a part that the request needs.
        """
        request = resolve(config, self.spec)
        self.components.shelf.check(request.loras)
        if request.loras and self.components.engine is not None:
            raise UsageError(
                "with an engine LoRAs merge when the model is loaded: give them there (`--lora`)"
            )
        if not request.distilled and config.preset is None and config.num_steps is None:
            hint_at_preset((*self.components.loras, *request.loras))
        if request.noise == "cuda" and self.components.device.type != "cuda":
            raise UsageError("noise 'cuda' needs a CUDA GPU; 'cpu' is the same on every machine")
        for rows in embeds:
            check_embeds(rows, self.spec)
        text = bool(_without(embeds, request.prompts))
        self.components.require(request.task, text=text, decode=decode)
        return request

    def plan(
        self,
        request: Request,
        embeds: tuple[Tensor | None, ...] = (None, None),
        *,
        refs: int = 0,
        decode: bool = True,
    ) -> Plan | None:
        """Decide where everything of this request will lie; parts that lie otherwise are let go.

        None on a CPU without a budget. What the prompts say moves nothing. Raises BudgetError.
        Reads the tokenizer and headers, no weights.
        """
        if self.components.device.type == "cpu" and self.budgets.vram is None:
            return None
        if self.components.engine is not None and self.components.engine.name == "onnxruntime":
            return None  # ONNX Runtime has memory of its own, which no plan can keep
        lengths = [len(rows.reshape(-1, rows.shape[-1])) for rows in embeds if rows is not None]
        texts = _without(embeds, request.prompts)
        lengths += [len(self._embeds[text]) for text in texts if text in self._embeds]
        if new := [text for text in texts if text not in self._embeds]:
            tokens = self.components.tokenizer()(new, self.spec.dit.text_len)
            lengths.append(int(tokens.mask.sum(1).max()))
        phases = {"encodes_text": bool(new), "decodes": decode}
        plan = plan_request(
            self.components, request, self.budgets, max(lengths), refs=refs, **phases
        )
        self.components.follow(plan)
        return plan

    @torch.inference_mode()
    def encode_prompts(self, prompts: list[str]) -> None:
        """Text features of every prompt not seen yet; afterwards the text encoder is let go."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._embeds]
        if not new:
            return
        self._forget(set(prompts), len(new))
        parts = self.components
        tokenizer, cache, pairs = parts.tokenizer(), parts.prompt_cache(), {}
        for prompt in new:
            tokens = tokenizer([prompt], self.spec.dit.text_len)
            for cut in tokens.truncated:
                log.warning(
                    "the prompt has %d tokens; the model reads the first %d",
                    cut.num_tokens,
                    self.spec.dit.text_len,
                )
            known = None if cache is None else cache.get(tokens.ids)
            if known is None:
                pairs[prompt] = (tokens.ids.to(parts.device), tokens.mask.to(parts.device))
            else:
                self._embeds[prompt] = known
        if not pairs:
            return
        encoded = within_memory(
            parts, "text", lambda: parts.umt5().forward_each(list(pairs.values()))
        )
        for (prompt, (ids, _)), features in zip(pairs.items(), encoded, strict=True):
            self._embeds[prompt] = features[0].float().cpu()
            if cache is not None:
                cache.put(ids, self._embeds[prompt])
        parts.release("umt5")

    def _forget(self, needed: set[str], coming: int) -> None:
        """Drop the oldest text features that would be too many and are not needed now."""
        old = [p for p in self._embeds if p not in needed]
        for prompt in old[: max(0, len(self._embeds) + coming - MAX_KEPT_PROMPTS)]:
            del self._embeds[prompt]

    def _text(self, embeds: Tensor | None, prompt: str) -> Text:
        rows = self._embeds[prompt] if embeds is None else embeds.reshape(-1, embeds.shape[-1])
        return Text.pad(rows, self.spec.dit.text_len, self.components.device)

    @torch.inference_mode()
    def denoise(
        self, run: Run, latents: Tensor | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Noise to latents: the loop over the schedule, `[1, C, T, h, w]` fp32."""
        request, conditions, clock = run.request, run.conditions, run.clock
        with clock.phase("prepare"):
            timesteps, sigmas = schedule_of(request)
            solver = sampler.make_solver(request.solver, sigmas)
            x = self._start(request, conditions, latents)
            self._follow(run)
            denoiser = Denoiser(self.components, conditions, request.loras)
        for i, t in enumerate(timesteps.tolist()):
            expert = expert_for(t, self.spec.boundary)
            guidance = guidance_for(expert, request.guidance, request.guidance_low)
            step, before = f"step {i + 1} of {len(timesteps)}", clock.seconds("denoise")
            with clock.phase("denoise"):
                velocity = denoiser.velocities(x, t, expert, guidance != 1.0, step)
                x = conditions.impose(solver.step(guide(*velocity, guidance), x))
            run.steps.append(clock.seconds("denoise") - before)
            if on_step is not None:
                on_step(Step(i, len(timesteps), t, float(sigmas[i]), x))
        denoiser.release()
        run.plan = self.components.plan  # a thriftier one, where memory ran out
        return x[:, :, conditions.num_refs :]

    def _follow(self, run: Run) -> None:
        """Another request may have come in between, memory run out, or the VAE be safer."""
        self.components.clock = run.clock
        if run.plan is not None:
            run.plan = up_to_date(run.plan, self.components)
            self.components.follow(run.plan)

    def _start(self, request: Request, conditions: Conditions, given: Tensor | None) -> Tensor:
        """What is given, or the seed's fp32 noise, drawn on the CPU or on CUDA (the reference)."""
        shape = noise_shape(request, self.spec, conditions.num_refs)
        if given is None:
            device = torch.device(request.noise)
            generator = torch.Generator(device).manual_seed(request.seed)
            given = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(given.shape) != shape:
            raise UsageError(f"latents are {list(given.shape)}; this request takes {list(shape)}")
        return conditions.impose(given.to(self.components.device, torch.float32))

    @torch.inference_mode()
    def decode(self, run: Run, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents to uint8 frames `[n, H, W, 3]`, a chunk at a time, so memory does not grow.

        Where the driver refuses memory, decoding starts again by a thriftier plan and goes on with
        the frames that are still wanted.
        """
        self._follow(run)
        report, total, done = self.components.report, latents.shape[2], 0
        nearest = run.request.task == "t2i"
        chunks: Iterator[Tensor] | None = None

        def next_pixels() -> np.ndarray | None:
            nonlocal chunks
            with run.clock.phase("decode"):
                if chunks is None:
                    chunks = self._decoded(self.components.vae(), latents, skip=done)
                pixels = next(chunks)[0]
                return to_uint8(pixels, nearest=nearest).cpu().numpy() if healthy(pixels) else None

        def let_go() -> None:
            nonlocal chunks
            chunks = None

        while done < total:
            pixels = within_memory(self.components, "decode", next_pixels, let_go)
            if pixels is None:
                let_go()
                make_vae_safer(self.components, f"decoding latent frame {done + 1}")
                self._follow(run)
                continue
            done += 1
            report("decode", done, total)
            yield pixels
        let_go()
        self.components.release("vae")

    def _decoded(self, vae: nn.Module, latents: Tensor, skip: int) -> Iterator[Tensor]:
        """Pixels `[1, 3, F, H, W]` of every latent frame but the first `skip`."""
        plan = self.components.plan
        work = VaeWork(chunk=1) if plan is None else plan.work("decode")
        chunks = vae.decode_chunks(latents.to(self.components.device), work=work)
        for done in range(latents.shape[2]):
            frames = next(chunks)[0]  # to hold the state would keep two
            if done >= skip:
                yield frames


def _without(embeds: tuple[Tensor | None, ...], prompts: tuple[str, ...]) -> list[str]:
    """The prompts whose text features are not given."""
    return [prompt for prompt, rows in zip(prompts, embeds, strict=False) if rows is None]
