"""``python3 -m codi_jax.app``: a page to try models in, to draw, edit, control and compare."""

import functools
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from codi_jax.cli import command_line
from codi_jax.cli.flags import Topic
from codi_jax.io.compiled_programs import keep_compiled_programs
from codi_jax.io.images import open_image
from codi_jax.models import sharding
from codi_jax.pipeline.loading import resolve_dtype
from codi_jax.pipeline.machine_flags import MachineFlags
from codi_jax.pipeline.model import Model
from codi_jax.pipeline.studio import Made, Studio

_PROGRAM = "python3 -m codi_jax.app"
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_OF_DEMO = Path("outputs/demo/student")
_STEPS = (1, 2, 4, 8, 20, 50)  # each is a program to compile
_WAITING = 32  # users in the queue
_CHOICES = {"left": "Left is better", "equal": "Equal", "right": "Right is better"}
_CSS = """
body:not(.dark) { --color-accent: var(--primary-700); }
.gradio-container :focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.picture .image-container { padding-top: 2rem; }
.gradio-container { width: 100%; max-width: 76rem !important; margin: auto; }
"""
# For screen readers: an empty picture has a role that may have a name, and a button's name is what it shows.
_HEAD = """<script>
new MutationObserver(() => {
  for (const each of document.querySelectorAll(".empty[aria-label]:not([role])")) each.setAttribute("role", "img");
  for (const each of document.querySelectorAll(".upload-container[aria-label]")) each.removeAttribute("aria-label");
}).observe(document, { childList: true, subtree: true });
</script>"""


@dataclass(frozen=True, kw_only=True)
class Args(MachineFlags):
    """Serves a page to try models in: draw, edit, control and compare a teacher and its student.

    Without flags it shows the embedded models. It can be reached from this machine only, unless --host says otherwise.
    """

    topic: ClassVar[Topic] = Topic.PAGE

    essential: ClassVar[tuple[str, ...]] = ("model", "student", "editor", "controlnet", "host", "port")

    model: str | None = None
    """The teacher, a text-to-image model: a folder in diffusers' layout, its id (owner/name) on the Hugging Face Hub,
    or a single .safetensors or .ckpt file. Default: the embedded one, which draws avatars."""
    student: str | None = None
    """Its student of few steps. Default: what `make demo` distilled; else the teacher itself in few steps."""
    student_lora: str | None = None
    """The student as a LoRA on the teacher."""
    editor: str | None = None
    """An InstructPix2Pix model, for the Edit tab. Default: the embedded one, if --model is."""
    controlnet: str | None = None
    """A ControlNet of the teacher that follows edges, for the Control tab. Default: the embedded one, if --model is."""
    guidance_scale: float = 3.0
    """The guidance scale that the page starts with."""
    student_guidance_scale: float | None = None
    """The student's. Default: as the teacher's for a student that takes it as an input, as LCM's do, else 1: it is
    built in."""
    image_guidance_scale: float | None = None
    """The editor's guidance scale of the picture that the page starts with. Default: 1.5; 2.5 for the embedded one."""
    steps: int = 50
    """The teacher's steps that the page starts with: 1, 2, 4, 8, 20 or 50."""
    student_steps: int = 4
    """The student's steps that the page starts with."""
    votes: Path = Path("outputs/votes.jsonl")
    """File that blind votes are appended to."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, without a password."""
    port: int = 7860
    """Port to listen at."""
    max_upload_megabytes: int = 10
    """Size limit of uploaded files."""
    warm_up: bool = True
    """Compile what the page starts with before it can be used."""

    def check(self) -> None:
        super().check()
        self.require_at_least(0, "guidance_scale", "student_guidance_scale", "image_guidance_scale")
        self.require_in(1, 65535, "port")
        self.require_at_least(1, "max_upload_megabytes")
        for flag in ("steps", "student_steps"):
            self.require(flag, getattr(self, flag) in _STEPS, f"one of {', '.join(map(str, _STEPS))}")
        if self.student is not None and self.student_lora is not None:
            raise ValueError("--student and --student_lora exclude each other: give one of them.")


def load(args: Args) -> Studio:
    """The models of the page: the teacher and what there is of student, editor and ControlNet.

    Raises:
      ValueError: if one cannot be loaded, or is not for its tab.
      OSError: if there is none.
    """
    embedded = args.model is None
    teacher = args.model or _embedded("avatars")
    if teacher is None:
        raise ValueError("the embedded models are not installed: name a model with --model.")
    options = {"dtype": resolve_dtype(args.dtype), "attention": args.attention, "place": sharding.place_here()}
    open_model = functools.partial(Model.from_pretrained, **options)
    models = {"teacher": open_model(teacher)}
    of_demo = str(_OF_DEMO) if embedded and not args.student_lora and _OF_DEMO.is_dir() else None
    if student := args.student or of_demo:
        models["student"] = open_model(student)
    elif args.student_lora is not None:
        models["student"] = models["teacher"].merge_lora(args.student_lora)
    if editor := args.editor or (_embedded("avatars-edit") if embedded else None):
        models["editor"] = open_model(editor)
    if controlnet := args.controlnet or (_embedded("avatars-controlnet") if embedded else None):
        shared = models["teacher"].params
        models["controlnet"] = open_model(teacher, controlnet, without_params=tuple(shared)).with_params(shared)
    for name, model in models.items():
        flag, task = name.replace("teacher", "model"), "edit" if name == "editor" else "text-to-image"
        if model.task != task:
            raise ValueError(f"--{flag} must be a model for {task}, not for {model.task or 'something else'}.")
    return Studio(models)


def scale_of(name: str, studio: Studio, args: Args) -> float:
    """The guidance scale that the page starts with, for one of the models."""
    if name != "student":
        return args.guidance_scale
    if args.student_guidance_scale is not None:
        return args.student_guidance_scale
    takes_guidance = studio.models[name].networks.unet.config.time_cond_proj_dim is not None
    return args.guidance_scale if takes_guidance else 1.0


def warm_up(studio: Studio, args: Args) -> Iterator[str]:
    """Compiles what the page starts with; says what it compiles."""
    for name in studio.models:
        yield name
        height, width = studio.size(name)
        needs = {"editor": "image", "controlnet": "control_image"}
        pictures = {needs[name]: Image.new("RGB", (width, height))} if name in needs else {}
        steps = args.student_steps if name == "student" else args.steps
        scale = scale_of(name, studio, args)
        studio.make(name, "", steps, lambda *_: None, guidance_scale=scale, **pictures)


def build(studio: Studio, args: Args) -> Any:
    """The page, a `gradio.Blocks`."""
    gr = _gradio()
    make = _Maker(studio, gr)
    with gr.Blocks(title="codi_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# codi_jax\nA teacher and its student, from the same noise.")
        with gr.Tab("Draw"):
            _draw_tab(gr, make, args)
        if "editor" in studio.models:
            with gr.Tab("Edit"):
                _edit_tab(gr, make, args)
        if "controlnet" in studio.models:
            with gr.Tab("Control"):
                _control_tab(gr, make, args)
        with gr.Tab("Compare"):
            _compare_tab(gr, make, args)
    return page.queue(max_size=_WAITING, default_concurrency_limit=1)


class _Maker:
    """Makes pictures for the page, with its progress bar, and shows errors there."""

    def __init__(self, studio: Studio, gr: Any) -> None:
        self.studio, self._gr = studio, gr

    def __call__(self, progress: Any, name: str, prompt: str, steps: int, seed: int | None, **options: Any) -> Made:
        def report(done: int, visited: int) -> None:
            progress((done, visited), desc=name if done else f"{name} (the first time, it is compiled)")

        try:
            return self.studio.make(name, prompt, steps, report, seed=int(seed or 0), **options)
        except (ValueError, FloatingPointError) as error:
            raise self._gr.Error(str(error)) from error

    def opened(self, path: str | None) -> Image.Image:
        """A file that was uploaded, read as any picture here: with limits, and nothing but its pixels."""
        try:
            return open_image(path or "")
        except (ValueError, OSError):
            raise self._gr.Error("Give a picture: a PNG, JPEG or WebP file.") from None


def _draw_tab(gr: Any, make: _Maker, args: Args) -> None:
    few = "student" if "student" in make.studio.models else "teacher"
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt, seed = _prompt(gr), _seed(gr)
            steps = gr.Radio(list(_STEPS), value=args.steps, label="Steps of the teacher")
            scale = _scale(gr, "Guidance of the teacher", args.guidance_scale)
            of_few = "Steps of the student" if few == "student" else "Fewer steps, beside it"
            few_steps = gr.Radio(list(_STEPS), value=args.student_steps, label=of_few)
            few_scale = scale
            if few == "student":
                few_scale = _scale(gr, "Guidance of the student", scale_of(few, make.studio, args))
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2, min_width=280), gr.Row():
            left, right = _picture(gr, f"{few}, few steps"), _picture(gr, "teacher")

    def draw_few(prompt: str, seed: int, steps: int, scale: float, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return _shown(gr, make(progress, few, prompt, steps, seed, guidance_scale=scale))

    def draw(prompt: str, seed: int, steps: int, scale: float, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return _shown(gr, make(progress, "teacher", prompt, steps, seed, guidance_scale=scale))

    inputs, pressed = [prompt, seed, few_steps, few_scale], [button.click, prompt.submit]
    first = gr.on(pressed, draw_few, inputs, left, concurrency_id="device", api_name="draw_few")
    first.success(draw, [prompt, seed, steps, scale], right, concurrency_id="device", api_name="draw")


def _edit_tab(gr: Any, make: _Maker, args: Args) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard"], elem_classes="picture"
            )
            instruction = _prompt(gr, "Instruction", "What to change: make the background blue")
            seed = _seed(gr)
            steps = gr.Radio(list(_STEPS), value=args.steps, label="Steps")
            scale = _scale(gr, "Guidance of the text", args.guidance_scale)
            of_picture = args.image_guidance_scale
            if of_picture is None:
                of_picture = 2.5 if args.editor is None else 1.5
            image_scale = _scale(gr, "Guidance of the picture", of_picture)
            button = gr.Button("Edit", variant="primary")
        with gr.Column(scale=2, min_width=280):
            result = _picture(gr, "Edited")

    def edit(
        path: str, instruction: str, seed: int, steps: int, scale: float, image_scale: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:  # fmt: skip
        opened = make.studio.resized("editor", make.opened(path))
        scales = {"guidance_scale": scale, "image_guidance_scale": image_scale}
        made = make(progress, "editor", instruction, steps, seed, image=opened, **scales)
        return _shown(gr, made)

    inputs = [picture, instruction, seed, steps, scale, image_scale]
    gr.on([button.click, instruction.submit], edit, inputs, result, concurrency_id="device", api_name="edit")


def _control_tab(gr: Any, make: _Maker, args: Args) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            brush = gr.Brush(default_size=6, colors=["#000000"], default_color="#000000", color_mode="fixed")
            drawing = gr.Sketchpad(
                label="Draw lines ...", type="pil", brush=brush, canvas_size=(384, 384), layers=False
            )
            upload = gr.Image(
                label="... or take the edges of a picture", type="filepath", sources=["upload", "clipboard"], height=160
            )
            prompt, seed = _prompt(gr), _seed(gr)
            steps = gr.Radio(list(_STEPS), value=args.steps, label="Steps")
            scale = _scale(gr, "Guidance", args.guidance_scale)
            button = gr.Button("Draw along the edges", variant="primary")
        with gr.Column(scale=2, min_width=280), gr.Row():
            edges, result = _picture(gr, "Edges"), _picture(gr, "Result")

    def find_edges(drawing: Any, path: str | None) -> Any:
        picture = make.opened(path) if path else _on_white(drawing)
        found = make.studio.edges("controlnet", picture, is_drawn=not path)
        if not found.any():
            raise gr.Error("There are no edges: draw some lines, or give a picture.")
        return found

    def control(
        found: Any, prompt: str, seed: int, steps: int, scale: float, progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:  # fmt: skip
        options = {"control_image": found, "guidance_scale": scale}
        return _shown(gr, make(progress, "controlnet", prompt, steps, seed, **options))

    inputs, pressed = [edges, prompt, seed, steps, scale], [button.click, prompt.submit]
    first = gr.on(pressed, find_edges, [drawing, upload], edges, api_name="edges")
    first.success(control, inputs, result, concurrency_id="device", api_name="control")


def _compare_tab(gr: Any, make: _Maker, args: Args) -> None:
    models = [name for name in make.studio.models if name in ("teacher", "student")]
    pair = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt, seed = _prompt(gr), _seed(gr)
            names = gr.CheckboxGroup(models, value=models, label="Models")
            steps = gr.CheckboxGroup(list(_STEPS), value=[1, 4], label="Steps")
            scale = _scale(gr, "Guidance of the teacher", args.guidance_scale)
            button = gr.Button("Compare all", variant="primary")
            blind = gr.Button("Two of them, blindly")
        with gr.Column(scale=2, min_width=280):
            gallery = gr.Gallery(label="All", columns=3, object_fit="contain", format="png")
    gr.Markdown("## Blind vote\nTwo of the models and steps above, from new noise. The vote shows what they are.")
    with gr.Row():
        left, right = _picture(gr, "Left"), _picture(gr, "Right")
    with gr.Row():
        buttons = {choice: gr.Button(text) for choice, text in _CHOICES.items()}
    verdict = gr.Markdown()

    def made(which: tuple[str, int], prompt: str, seed: int | None, scale: float, progress: Any) -> Made:
        name, count = which
        its_scale = scale_of(name, make.studio, args) if name == "student" else scale
        return make(progress, name, prompt, count, seed, guidance_scale=its_scale)

    def compare(
        prompt: str, seed: int, names: Sequence[str], steps: Sequence[int], scale: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[tuple[Any, str]]:  # fmt: skip
        pictures = [made(which, prompt, seed, scale, progress) for which in itertools.product(names, sorted(steps))]
        return [(each.pixels, each.caption) for each in pictures]

    def draw_two(
        prompt: str, names: Sequence[str], steps: Sequence[int], scale: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:  # fmt: skip
        possible = list(itertools.product(names, steps))
        if len(possible) < 2:
            raise gr.Error("Choose two models or numbers of steps at least.")
        seed = random.randrange(2**31)
        two = [made(which, prompt, seed, scale, progress) for which in random.sample(possible, 2)]
        sides = {side: f"{each.name}@{each.steps}" for side, each in zip(("left", "right"), two, strict=True)}
        about = {"prompt": prompt, "seed": seed, "guidance_scale": scale, **sides}
        return about, *(each.pixels for each in two), ""

    def vote(choice: str, about: dict[str, Any] | None) -> tuple[Any, str]:
        if about is None:
            raise gr.Error("There is nothing to vote on: draw two pictures first.")
        _append(args.votes, {"time": time.strftime("%FT%T"), **about, "choice": choice})
        return None, f"You voted: {_CHOICES[choice].lower()}. Left was {about['left']}, right {about['right']}."

    inputs, shared = [prompt, names, steps, scale], {"concurrency_id": "device"}
    button.click(compare, [prompt, seed, names, steps, scale], gallery, api_name="compare", **shared)
    blind.click(draw_two, inputs, [pair, left, right, verdict], api_name="draw_two", **shared)
    for choice, pressed in buttons.items():
        pressed.click(functools.partial(vote, choice), pair, [pair, verdict], api_name=f"vote_{choice}")


def _prompt(gr: Any, label: str = "Prompt", placeholder: str = "A person with glasses and a green hat") -> Any:
    # With several lines, Enter begins a new one.
    return gr.Textbox(label=label, placeholder=placeholder, lines=2, max_lines=4, info="Shift + Enter starts.")


def _seed(gr: Any) -> Any:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)


def _scale(gr: Any, label: str, value: float) -> Any:
    return gr.Slider(0, 15, value=value, step=0.5, label=label)


def _upload(gr: Any, label: str, **options: Any) -> Any:
    return gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], elem_classes="picture", **options)


def _picture(gr: Any, label: str) -> Any:
    options = {"format": "png", "height": 320, "buttons": ["download"], "elem_classes": "picture"}
    return gr.Image(label=label, alt_text=label, interactive=False, **options)


def _shown(gr: Any, picture: Made) -> Any:
    return gr.update(value=picture.pixels, label=picture.caption, alt_text=picture.caption)


def _on_white(drawing: Any) -> Image.Image:
    """A drawing as it is seen on the page."""
    composite = (drawing or {}).get("composite")
    if composite is None:
        return Image.new("RGB", (1, 1), "white")
    white = Image.new("RGBA", composite.size, "white")
    return Image.alpha_composite(white, composite.convert("RGBA")).convert("RGB")


def _append(path: Path, vote: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vote, ensure_ascii=False) + "\n")


def _embedded(name: str) -> str | None:
    return str(_ASSETS / name) if (_ASSETS / name).is_dir() else None


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ValueError('the page needs Gradio: python3 -m pip install "codi_jax[app]".') from None
    return gradio


def run(args: Args) -> None:
    """Loads the models, compiles what the page starts with, and serves the page until it is interrupted.

    Raises:
      ValueError: if a flag makes no sense, a model cannot be loaded, or Gradio is not installed.
      OSError: if there is no such model, or the port is taken.
    """
    args.check()
    gr = _gradio()
    keep_compiled_programs(args.ccache)
    print("loading the models ...", flush=True)
    studio = load(args)
    if args.warm_up:
        for name in warm_up(studio, args):
            print(f"compiling the {name}'s program ...", flush=True)
    page = build(studio, args)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        max_file_size=f"{args.max_upload_megabytes}mb",
        theme=_theme(gr),
        css=_CSS,
        head=_HEAD,
        share=False,
        footer_links=[],
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"open http://{args.host}:{args.port}", flush=True)
    page.block_thread()


def _theme(gr: Any) -> Any:
    """Gradio's own, with as much contrast as WCAG asks for."""
    return gr.themes.Default().set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def main() -> None:
    """The command line."""
    command_line.run(Args, run, _PROGRAM, save_memory="a smaller model, or --dtype bfloat16")


if __name__ == "__main__":
    main()
