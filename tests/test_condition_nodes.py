"""Images, control videos and masks on their way through the nodes: encoded once, carried in the conditioning, read by the sampler."""

import pytest

from .support.comfy_runtime import NODES, SHOWN

MORE = """
Control, Inpaint = part("nodes.control_to_video").CogVideoXControlToVideo, part("nodes.inpainting").CogVideoXInpaint
VideoToVideo, conditions = part("nodes.video_to_video").CogVideoXVideoToVideo, part("parallel_backend.cogvideox.pipeline.conditions")
clip = torch.rand(11, 40, 100, 3, generator=torch.Generator().manual_seed(5))
covered = image.cover(clip[:9], width=48, height=32)
size = {"width": 48, "height": 32, "length": 9, "batch_size": 1}
def sampled(model, found):
    return call(Sampler, model=model, positive=found[0], negative=found[1], latent=found[2], **settings)[0]["samples"]
def expected(model, **fields):
    latent = jobs.empty_latent(width=48, height=32, frames=9)
    return host.local().sample(jobs.SampleJob(model.model, positive[0][0], latent, negative[0][0], seed=3, steps=2, **fields)).tensor
def encode(model, pixels):
    return host.local().encode(jobs.EncodeJob(model.model, pixels)).tensor
class CoreVAE:
    decode_tiled = None
    def encode(self, pixels):
        return torch.ones(1, 16, (len(pixels) - 1) // 4 + 1, pixels.shape[1] // 8, pixels.shape[2] // 8)
"""
LIKES = {
    "text": "5b",
    "i2v": "2b-i2v",
    "control": "5b-control",
    "inp": "5b-inp",
    "inp15": "1.5-5b-inp",
    "v2v15": "1.5-5b",
    "void": "1.5-5b-void",
}


@pytest.fixture
def nodes(in_comfyui, checkpoints):
    """Runs lines that use the nodes on small models, by the names of LIKES."""
    paths = "".join(f"{name} = {str(checkpoints[like])!r}\n" for name, like in LIKES.items())
    return lambda code: in_comfyui(NODES + MORE + paths + code)


def test_what_the_nodes_give_is_what_a_job_is_given_and_what_they_leave_out_is_said(nodes):
    shown, log = nodes("""
model, vae = handles(control)
found = call(Control, **prompts, vae=vae, control_video=clip, strength=0.5, start_percent=0.0, end_percent=0.4, **size)
fields = {"control": encode(model, covered), "control_strength": 0.5, "control_end": 0.4}
equal = {"control": torch.equal(sampled(model, found), expected(model, **fields))}

model, vae = handles(inp)
mask = torch.zeros(1, 40, 100)
mask[:, :20] = 1
found = call(Inpaint, **prompts, vae=vae, video=clip, mask=mask, **size)
known = conditions.fit_mask(mask, frames=9, width=48, height=32)
fields = {"masked_video": encode(model, conditions.shown(covered, known)), "mask": conditions.latent_mask(known)}
equal["inpaint"] = torch.equal(sampled(model, found), expected(model, **fields))
keys = sorted(found[0][0][1])
all_new = sorted(call(Inpaint, **prompts, vae=vae, video=clip, mask=torch.ones(1, 40, 100), **size)[0][0][1])

model, vae = handles(void)
quad = torch.linspace(0, 1, 40)[None, :, None].expand(11, 40, 100)
five = {**size, "length": 5}
found = call(Inpaint, **prompts, vae=vae, video=clip, mask=quad, **five)
known = conditions.fit_mask(quad, frames=5, width=48, height=32)
pixels, _ = conditions.to_show(covered[:5], known, noise=0.0, removes=True)
fields = {name: encode(model, part) for name, part in pixels.items()}
latent = jobs.empty_latent(width=48, height=32, frames=5)
wanted = host.local().sample(jobs.SampleJob(model.model, positive[0][0], latent, negative[0][0], seed=3, steps=2, **fields)).tensor
equal["void"] = torch.equal(sampled(model, found), wanted)
of_the_core = found[0][0][1]["concat_latent_image"]  # as its VOIDInpaintConditioning lays it out
equal["void as the core"] = torch.equal(of_the_core, torch.cat([fields["mask"], fields["masked_video"]], dim=1))
all_removed = call(Inpaint, **prompts, vae=CoreVAE(), model=model, video=clip, mask=torch.ones(1, 40, 100), **five)[0][0][1]
model, vae = handles(inp)

found = call(Node, **prompts, vae=vae, start_image=clip[:1], end_image=clip[-1:], end_percent=0.4, **size)
ends = [image.cover(one, width=48, height=32) for one in (clip[:1], clip[-1:])]
video, known = conditions.between_images(*ends, frames=9)
fields = {"masked_video": encode(model, video), "mask": conditions.latent_mask(known), "image_end": 0.4}
equal["ends"] = torch.equal(sampled(model, found), expected(model, **fields))
found = call(Node, **prompts, vae=vae, **size)
equal["nothing"] = torch.equal(sampled(model, found), expected(model))

model, vae = handles(i2v)
seen = {"strength": 0.5, "start_percent": 0.2, "end_percent": 0.4}
found = call(Node, **prompts, vae=vae, start_image=clip, image_scale="raw", **seen, **size)
fields = {"image": encode(model, covered[:1]), "image_scale": "raw", "image_strength": 0.5, "image_start": 0.2, "image_end": 0.4}
equal["raw"] = torch.equal(sampled(model, found), expected(model, **fields))
found = call(Node, **prompts, vae=vae, start_image=clip[:1], end_image=clip[:9], **size)
fields = {"image": encode(model, covered[:1]), "end_image": encode(model, covered[-1:])}
equal["interpolation"] = torch.equal(sampled(model, found), expected(model, **fields))

_, vae = handles(text)
latent = call(VideoToVideo, vae=vae, video=clip, **{**size, "batch_size": 2})[0]["samples"]
equal["video"] = torch.equal(latent, encode(handles(text)[0], covered).repeat(2, 1, 1, 1, 1))

_, vae = handles(v2v15)
core = CoreVAE()
latent = call(VideoToVideo, vae=vae, video=clip, **{**size, "length": 13})[0]["samples"]
shapes = {"short": latent.shape}
shapes["short core"] = call(VideoToVideo, vae=core, video=clip, **{**size, "length": 13})[0]["samples"].shape
end = call(Node, **prompts, vae=core, end_image=clip[:1], **size)[0][0][1]
start = call(Node, **prompts, vae=core, start_image=clip[:1], **size)[0][0][1]
shapes |= {"end": end["concat_latent_image"].shape, "start": start["concat_latent_image"].shape}

path = Path(inp) / "transformer" / "config.json"
before = path.read_text()
path.write_text(json.dumps(json.loads(before) | {"add_noise_in_inpaint_model": True}))
try:
    model, vae = handles(inp)
    noisy = call(Node, **prompts, vae=vae, start_image=clip[:1], image_scale="raw", **size)[0][0][1]["concat_latent_image"]
finally:
    path.write_text(before)
video, known = conditions.between_images(covered[:1], None, frames=9)
equal["noise"] = torch.equal(noisy, encode(model, conditions.add_noise(video, 0.0563)))
show(equal=equal, keys=keys, all_new=all_new, all_removed=list(all_removed["concat_latent_image"].shape), shapes={name: list(shape) for name, shape in shapes.items()},
     mask=end["concat_mask"][0, 0, :, 0, 0].tolist())
""")
    assert shown["equal"] == dict.fromkeys(
        ("control", "inpaint", "void", "void as the core", "ends", "nothing", "raw", "interpolation", "video", "noise"), True
    )
    assert shown["all_removed"] == [1, 32, 2, 4, 6]
    assert shown["keys"] == ["concat_latent_image", "concat_mask", "pooled_output"]  # the core's own
    assert shown["all_new"] == ["pooled_output"]
    assert shown["mask"] == [1, 1, 1]  # VideoX-Fun's mask looks at the middle two of every four frames
    short, whole, one = [1, 16, 2, 4, 6], [1, 16, 3, 4, 6], [1, 16, 1, 4, 6]
    assert shown["shapes"] == {"short": short, "short core": whole, "end": whole, "start": one}
    assert "5 of the video's 11 frames are used, not 13: this kind of model takes 8k+5" in log
    assert "9 of the video's 11 frames are used, not 13: this kind of model takes 4k+1" in log
    assert "image_scale is for image-to-video models" in log
    assert "2b-i2v is shown the end image in the last latent frame, as CogvideoX-Interpolation's weights were trained" in log
    assert "does not use" not in log


def test_a_clip_of_another_rate_is_thinned_out_to_the_model_s_and_the_node_says_so(nodes):
    shown, _ = nodes("""
lines = []
host.say = lambda line, *where, **how: lines.append(line)
clip = torch.arange(40).view(-1, 1, 1, 1).expand(-1, 32, 48, 3) / 40
frames = lambda found: (found.mean(dim=(1, 2, 3)) * 40).round().int().tolist()
class Kept(CoreVAE):
    def encode(self, pixels):
        self.kept = frames(pixels)
        return super().encode(pixels)
core, used, rates = Kept(), {}, {}
def run(name, node, *, video="video", last=3, **given):
    found = call(node, vae=core, **{video: clip}, **given, **size)
    used[name], rates[name] = core.kept, found[last]
one, new = handles(text)[0], handles(v2v15)[0]
guided = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "video": "control_video", **prompts}
run("24", VideoToVideo, last=1, source_fps=24.0, model=one)
run("24 of 1.5", VideoToVideo, last=1, source_fps=24.0, model=new)
run("unknown rate", VideoToVideo, last=1, model=one)
run("unknown model", VideoToVideo, last=1, source_fps=24.0)
run("control", Control, source_fps=30.0, model=handles(control)[0], **guided)
mask = torch.zeros(40, 32, 48)
mask[12:, :16] = 1
found = call(Inpaint, vae=core, video=clip, mask=mask, source_fps=32.0, model=handles(inp)[0], **prompts, **size)
used["inpaint"], rates["inpaint"] = core.kept, found[3]
known = conditions.latent_mask(mask[:36:4])
show(used=used, rates=rates, lines=lines, mask=torch.equal(found[0][0][1]["concat_mask"], known))
""")
    every = lambda step: [step * place for place in range(9)]  # noqa: E731
    assert shown["used"].pop("inpaint")[:3] == [0, 4, 8]  # later ones are masked in part
    assert shown["used"] == {
        "24": every(3), "24 of 1.5": every(2)[:5], "unknown rate": every(1), "unknown model": every(1), "control": every(4),
    }  # fmt: skip
    assert shown["rates"] == {
        "24": 8, "24 of 1.5": 12, "unknown rate": 8, "unknown model": 24, "control": 7.5, "inpaint": 8,
    }  # fmt: skip
    assert shown["mask"]
    said = "\n".join(shown["lines"])
    assert "1 of 3 frames of the clip (24 fps) is used, 8 fps; the model was trained at 8" in said
    assert (
        "every frame is used, as if the clip had the model's rate (the model was trained at 8 fps); connect source_fps" in said
    )
    assert "the core's VAE does not say what rate the model was trained at; connect the model too" in said


def test_noise_on_the_images_is_the_checkpoint_s_or_as_set_and_the_model_says_it_for_the_core_s_vae(nodes):
    shown, log = nodes("""
class Kept(CoreVAE):
    def encode(self, pixels):
        self.kept = pixels[0]
        return super().encode(pixels)
core, start = Kept(), torch.full((1, 32, 48, 3), 0.5)
model = dataclasses.replace(handles(inp)[0], checkpoint=Checkpoint.open(inp))
noisy = dataclasses.replace(model.checkpoint, transformer=model.checkpoint.transformer | {"add_noise_in_inpaint_model": True})
noisy = dataclasses.replace(model, checkpoint=noisy)
def spread(**given):
    call(Node, **prompts, vae=core, start_image=start, **given, **size)
    return (core.kept * 2 - 1).std().item()
show(trained=spread(model=noisy), plain=spread(model=model), set=spread(model=model, noise_aug_strength=0.2),
     off=spread(model=noisy, noise_aug_strength=0.0))
call(Node, **prompts, vae=core, end_image=start, **size)
""")
    assert shown == {
        "trained": pytest.approx(0.0563, rel=0.1), "plain": 0, "set": pytest.approx(0.2, rel=0.1), "off": 0,
    }  # fmt: skip
    assert "no noise on what the model is shown: the core's VAE does not say how it was trained; connect the model too" in log


def test_what_does_not_fit_is_named_in_one_line_and_nothing_is_loaded(nodes):
    shown, _ = nodes("""
by_name = {name: handles(globals()[name]) for name in ("text", "i2v", "control", "inp", "inp15")}
core = CoreVAE()
ends = call(Node, **prompts, vae=core, start_image=clip[:1], end_image=clip[:1], **size)
start = call(Node, **prompts, vae=core, start_image=clip[:1], **size)
controlled = call(Control, **prompts, vae=core, control_video=clip, strength=1.0, start_percent=0.0, end_percent=1.0, **size)
def sample_with(name, found):
    return refusal(Sampler, model=by_name[name][0], positive=found[0], negative=found[1], latent=found[2], **settings)
show(
    end_i2v=refusal(Node, **prompts, vae=by_name["i2v"][1], end_image=clip[:1], **size),
    end_text=refusal(Node, **prompts, vae=by_name["text"][1], end_image=clip[:1], **size),
    ends_text=sample_with("text", ends), ends_i2v=sample_with("i2v", ends), ends_control=sample_with("control", ends),
    start_inp=sample_with("inp", start), start_control=sample_with("control", start),
    controlled_text=sample_with("text", controlled), controlled_inp=sample_with("inp", controlled),
    nothing=sample_with("control", (positive, negative, start[2])),
    odd=sample_with("inp15", ends),
    mask=refusal(Inpaint, **prompts, vae=by_name["inp"][1], video=clip, mask=torch.ones(2, 40, 100), **size),
    width=refusal(Control, **prompts, vae=core, control_video=clip, strength=1.0, start_percent=0.0, end_percent=1.0,
                  **{**size, "width": 100}),
    wrapper_vae=refusal(VideoToVideo, vae=object(), video=clip, **size),
    wrapper_prompt=refusal(Inpaint, positive=positive[0][0], negative=negative, vae=core, video=clip, mask=torch.ones(40, 100), **size),
    loads=host.local().status()["loads"],
)
""")
    assert shown.pop("loads") == 0
    words = {
        "end_i2v": "needs a start image with the end image; for an end image or a mask use an inpaint model, such as",
        "end_text": "takes no end image",
        "ends_text": "makes videos from text alone; for an end image or a mask use an inpaint model",
        "ends_i2v": "or, for frame interpolation, give CogVideoX Image To Video 2b-i2v or its VAE",
        "ends_control": "makes videos from a control video; for an end image or a mask use",
        "start_inp": "takes a start image as a masked video, and this one was encoded for an image-to-video model",
        "start_control": "makes videos from a control video; for a start image use an image-to-video model",
        "controlled_text": "makes videos from text alone; for a control video use a control model",
        "controlled_inp": "makes what is missing of a video; for a control video use a control model",
        "nothing": "needs a control video (CogVideoX Control To Video, or --control-video)",
        "odd": "needs a multiple of 2 latent frames and the video has 3: use 13 frames",
        "mask": "the mask has 2 frames and the video 9; give one for all, or as many",
        "width": "width is 100; it must be a multiple of 16",
        "wrapper_vae": "this VAE comes from the CogVideoX wrapper",
        "wrapper_prompt": "positive comes from the CogVideoX wrapper",
    }
    assert set(shown) == set(words)
    for name, line in shown.items():
        assert words[name] in line and "\n" not in line, (name, line)


def test_prompts_take_turns_over_the_steps_and_what_else_they_carry_is_named_in_the_node(nodes):
    shown, _ = nodes(
        SHOWN
        + """
from nodes import ConditioningCombine, ConditioningSetArea, ConditioningSetMask, ConditioningZeroOut
import node_helpers
model, _ = handles(text)
a, b = positive[0][0], prompt(4)[0][0]
def ranged(conditioning, start, end):
    return node_helpers.conditioning_set_values(conditioning, {"start_percent": start, "end_percent": end})
def both(*conditionings):
    return ConditioningCombine().combine(*conditionings)[0]
latent = {"samples": jobs.empty_latent(width=48, height=32, frames=9)}
ran = []
host.run = lambda job, *_: ran.append(job) or jobs.Result(job.latent)
def made(given, positive=a, positive_starts=()):
    shown.clear()
    at(f"prompt {len(ran)}", "1")
    call(Sampler, model=model, positive=given, negative=negative, latent=latent, **settings)
    job, lines = ran[-1], lines_of_last() if shown else []
    right = torch.equal(job.positive, positive) and job.positive_starts == positive_starts
    return [right and torch.equal(job.negative, negative[0][0]) and not job.negative_starts, lines]
A, B = [[a, {"pooled_output": None}]], [[b, {}]]
turns = {"positive": torch.stack([a, b], dim=1), "positive_starts": (0.0, 0.5)}
show(
    plain=made(A), ranges=made(both(ranged(A, 0.0, 0.5), ranged(B, 0.5, 1.0)), **turns),
    reverse=made(both(ranged(B, 0.5, 1.0), ranged(A, 0.0, 0.5)), **turns),
    half=made(both(ranged(A, 0.0, 0.5), B), **turns), gap=made(both(ranged(A, 0.25, 0.4), ranged(B, 0.5, 0.75)), **turns),
    alone=made(ranged(A, 0.0, 0.3)), combined=made(both(A, B)), never=made(both(A, ranged(B, 0.5, 0.5))),
    concat=made([[torch.cat([a, b], dim=1), {}]]), average=made([[a * 0.5 + b * 0.5, {}]], positive=a * 0.5 + b * 0.5),
    zero=made(ConditioningZeroOut().zero_out(A)[0], positive=torch.zeros_like(a)),
    area=made(ConditioningSetArea().append(A, 32, 32, 0, 0, 0.5)[0]),
    mask=made(ConditioningSetMask().append(A, torch.ones(1, 8, 8), "default", 0.5)[0]),
    hooks=made(both(ranged(A, 0.0, 0.5), [[b, {"start_percent": 0.5, "hooks": object()}]]), **turns),
    unlike=refusal(Sampler, model=model, positive=both(ranged(A, 0.0, 0.5), [[b[:, :20], {}]]), negative=negative,
                   latent=latent, **settings),
    empty=refusal(Sampler, model=model, positive=[], negative=negative, latent=latent, **settings),
)
"""
    )
    assert "they must be equal" in shown.pop("unlike") and "has no prompt" in shown.pop("empty")
    assert {name: same for name, (same, _) in shown.items()} == dict.fromkeys(shown, True)
    first = "of the steps; the first of them is used"
    earlier = "of the steps; the previous one continues, or the first one starts earlier"
    assert {name: lines for name, (_, lines) in shown.items() if lines} == {
        "half": [f"positive: several prompts are set for 0 to 50 % {first}"],
        "gap": [f"positive: no prompt is set for 0 to 25 %, 40 to 50 %, 75 to 100 % {earlier}"],
        "alone": [f"positive: no prompt is set for 30 to 100 % {earlier}"],
        "combined": [f"positive: several prompts are set for 0 to 100 % {first}", "positive: prompt 2 of 2 is not used"],
        "never": ["positive: prompt 2 of 2 is not used"],
        "concat": ["positive has 64 tokens; the model takes 32, the rest is cut off"],
        "area": ["positive carries area, set_area_to_bounds, strength, which CogVideoX does not use"],
        "mask": ["positive carries mask, mask_strength, set_area_to_bounds, which CogVideoX does not use"],
        "hooks": ["positive carries hooks, which CogVideoX does not use"],
    }


def test_of_prompts_with_different_images_the_first_one_s_are_used_and_the_node_says_so(nodes):
    shown, _ = nodes(
        SHOWN
        + """
model, vae = handles(i2v)
start = call(Node, **prompts, vae=vae, start_image=clip[:1], **size)
end = call(Node, **prompts, vae=vae, start_image=clip[1:2], **size)
ran, found = [], []
host.run = lambda job, *_: ran.append(job) or jobs.Result(job.latent)
for given in (start[0], positive + start[0], positive + start[0] + end[0]):
    shown.clear()
    at(f"prompt {len(ran)}", "1")
    sampled(model, (given, start[1], start[2]))
    same = torch.equal(ran[-1].image, start[0][0][1]["concat_latent_image"])
    found.append([same, [line for line in lines_of_last() if "different" in line] if shown else []])
show(found=found)
"""
    )
    said = "the prompts of positive carry different images or videos; those of the first are used"
    assert shown["found"] == [[True, []], [True, []], [True, [said]]]
