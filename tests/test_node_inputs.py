"""What other nodes and scripts pass to the pack's nodes: what has an obvious meaning is taken, the rest is refused in one line."""

import pytest

from .support.comfy_runtime import NODES, SHOWN

MORE = """
nodes = part("nodes")
base = part("nodes.base")
Empty, VideoToVideo = part("nodes.conditioning").EmptyCogVideoXLatent, part("nodes.video_to_video").CogVideoXVideoToVideo
Control, Inpaint = part("nodes.control_to_video").CogVideoXControlToVideo, part("nodes.inpainting").CogVideoXInpaint
Decode = part("nodes.decoding").CogVideoXDecode
model, vae = handles(path)
small = {"width": 16, "height": 16, "length": 5, "batch_size": 1}
video = torch.rand(5, 20, 25, 3, generator=torch.Generator().manual_seed(5))
mask = torch.ones(1, 20, 25)
mask[:, :10] = 0
control = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
def result(node, **inputs):
    try:
        return node.execute(**inputs).result
    except errors.RequestError as error:
        return str(error)
def encoded(node, found):
    if node is VideoToVideo:
        return found[0]["samples"]
    carried = found[0][0][1]
    return carried["cogvideox_control"]["control"] if node is Control else carried["concat_latent_image"]
class CoreVAE:
    decode_tiled = None
    def encode(self, pixels):
        return pixels[::4, ::8, ::8].mean(dim=-1).expand(1, 16, -1, -1, -1)
core = CoreVAE()
PICTURES = {
    Node: lambda pictures: dict(**prompts, vae=core, start_image=pictures, **small),
    VideoToVideo: lambda pictures: dict(vae=core, video=pictures, **small),
    Control: lambda pictures: dict(**prompts, vae=core, control_video=pictures, **control, **small),
    Inpaint: lambda pictures: dict(**prompts, vae=core, video=pictures, mask=mask, **small),
}
"""


@pytest.fixture
def nodes(in_comfyui):
    """Runs lines that call nodes as a script does, without ComfyUI's own checks."""
    return lambda code: in_comfyui(NODES + MORE + code)[0]


def test_every_number_text_and_switch_of_every_node_is_checked_by_its_own_schema(nodes):
    shown = nodes("""
VALID = {"INT": lambda item: item.default, "FLOAT": lambda item: item.default, "STRING": lambda item: item.default,
         "COMBO": lambda item: item.default or "demo", "BOOLEAN": lambda item: item.default}
GIVEN = {"MODEL": model, "VAE": vae, "CONDITIONING": positive, "LATENT": {"samples": latent}, "IMAGE": video, "MASK": mask,
         "COGVIDEOX_XDIT_MODEL": model, "COGVIDEOX_XDIT_CONTROLNET": sockets.ControlNetHandle(None), "XDIT_BACKEND": None, "NOISE": None}
WRONG = {"INT": ["many", [1], None, float("nan"), 2.5, "below", "above"], "FLOAT": ["many", [1], None, float("nan"), "below", "above"],
         "STRING": [[1], None], "COMBO": [[1], None], "BOOLEAN": ["maybe", 2, None], "VAE": [object()], "LATENT": [None, latent, {}],
         "CONDITIONING": [None, [], [[1, {}]], positive[0][0]], "IMAGE": ["a", None], "MASK": [5, torch.ones(2, 3, 4, 5)],
         "COGVIDEOX_XDIT_MODEL": [5, None], "COGVIDEOX_XDIT_CONTROLNET": [5, None], "XDIT_BACKEND": [5], "NOISE": [5]}
tried, wrong, bare = 0, [], [node.__name__ for node in nodes.NODES if not issubclass(node, base.CogVideoXNode)]
for node in nodes.NODES:
    inputs = node.define_schema().inputs
    valid = {item.id: VALID[item.io_type](item) if item.io_type in VALID else GIVEN[item.io_type] for item in inputs}
    for item in inputs:
        for value in [] if item.id in node.own_checks else WRONG[item.io_type]:
            if value is None and item.optional:
                continue
            if value in ("below", "above") and isinstance(value, str):
                value = item.min - 1 if value == "below" else item.max + 1
            tried += 1
            try:
                node.execute(**{**valid, item.id: value})
                line = "taken"
            except errors.RequestError as error:
                line = str(error)
            except Exception as error:
                line = f"{type(error).__name__} {error}"
            if not (line.startswith((item.display_name or item.id) + " ") or line.startswith("this VAE")) or chr(10) in line:
                wrong.append([node.__name__, item.id, str(value)[:40], line])
show(tried=tried, wrong=wrong, bare=bare)
""")
    assert shown["bare"] == [] and shown["wrong"] == []
    assert shown["tried"] > 200


def test_numbers_with_an_obvious_meaning_are_taken(nodes):
    shown = nodes("""
import numpy
def asks(**given):
    absent = {"positive": None, "negative": None, "latent": None}
    try:
        return Sampler.check_lazy_status(**{**settings, **absent, "model": model, **given})
    except errors.RequestError as error:
        return str(error)
(made,) = result(Empty, width=96.0, height="64", length=torch.tensor(5.0), batch_size=numpy.int64(2))
seed = next(item for item in Sampler.define_schema().inputs if item.id == "seed")
show(shape=made["samples"].shape, seeds=[str(part("nodes.inputs").checked(given, seed)) for given in (2**64 - 1, str(2**64 - 1))],
     lines=[result(Empty, **{**small, "width": value}) for value in (96.5, "wide", 8, float("nan"), None, torch.ones(2))],
     lazy=[asks(), asks(cfg="many"), asks(model=5), asks(latent={"samples": latent})], warmup=prepared(part("nodes.backend").XDiTBackend).execute("cpu", "auto", 4.0).result[0].pipefusion_warmup)
""")
    assert shown["shape"] == [2, 16, 2, 8, 12]
    assert shown["seeds"] == [str(2**64 - 1)] * 2
    assert shown["lines"] == [
        "width is 96.5; it must be a whole number, such as 96",
        "width is 'wide'; it must be a number",
        "width is 8; use 16 to 4096",
        "width is nan; use 16 to 4096",
        "width is None; it must be a number",
        "width is a tensor of shape [2]; it must be a number",
    ]
    assert shown["lazy"] == [
        ["latent", "positive", "negative"],
        "cfg is 'many'; it must be a number",
        "model is 5; connect Load CogVideoX",
        ["positive", "negative"],
    ]
    assert shown["warmup"] == 4


def test_pictures_with_an_obvious_meaning_are_taken_and_others_refused_by_every_node(nodes):
    shown = nodes("""
grey = video.mean(dim=-1, keepdim=True)
FORMS = {
    "alpha": (torch.cat([video, torch.zeros(5, 20, 25, 1)], dim=-1), video),
    "grey": (grey, grey.repeat(1, 1, 1, 3)),
    "batch": (video[None], video),
    "one": (video[0], video[:1]),
    "bytes": ((video * 255).byte(), (video * 255).byte() / 255),
    "dot": (video[:, :1, :1], video[:, :1, :1].expand(-1, 20, 25, -1)),
}
WRONG = {"two": video[..., :2], "none": video[:0], "flat": video[0, 0], "thin": video[:, :1, :1].expand(-1, 1, 9999, -1), "nan": video * float("nan"), "list": [1]}
differ, lines = [], {}
for node, inputs in PICTURES.items():
    usual = result(node, **inputs(video))
    for name, (given, meant) in FORMS.items():
        got, wanted = result(node, **inputs(given)), usual if meant is video else result(node, **inputs(meant))
        if isinstance(got, str) or (encoded(node, got) - encoded(node, wanted)).abs().max() > 1e-5:
            differ.append([node.__name__, name, got if isinstance(got, str) else "another"])
    lines[node.__name__] = {name: str(result(node, **inputs(given))) for name, given in WRONG.items()}
MASKS = {"plane": mask[0], "channel": mask[:, None], "last": mask[..., None], "bool": mask > 0, "bytes": (mask * 255).byte()}
meant = encoded(Inpaint, result(Inpaint, **PICTURES[Inpaint](video)))
masks = [name for name, given in MASKS.items()
         if not torch.equal(encoded(Inpaint, result(Inpaint, **{**PICTURES[Inpaint](video), "mask": given})), meant)]
lines["mask"] = [result(Inpaint, **{**PICTURES[Inpaint](video), "mask": given}) for given in (mask * float("nan"), mask[0, 0], mask[:0])]
show(differ=differ, lines=lines, masks=masks)
""")
    assert shown["differ"] == [] and shown["masks"] == []
    mask = shown["lines"].pop("mask")
    assert [line.startswith("mask has ") for line in mask] == [True] * 3
    name = {"CogVideoXImageToVideo": "start_image", "CogVideoXControlToVideo": "control_video"}
    for node, lines in shown["lines"].items():
        assert (
            lines.pop("thin")
            == "an image of 9999x1 cannot be resized to 16x16 without cropping nearly all of it; crop it first"
        )
        for line in lines.values():
            assert line.startswith(f"{name.get(node, 'video')} ") and "\n" not in line


def test_a_latent_that_is_none_of_ours_is_refused_for_its_own_reason_at_every_door(nodes):
    shown = nodes("""
class NestedTensor:
    pass
LATENTS = {"ltxv": torch.zeros(1, 128, 2, 3, 5), "image": torch.zeros(1, 4, 8, 8), "nan": latent * float("nan"), "both": NestedTensor(),
           "whole": latent.long(), "wrapper": torch.zeros(1, 3, 16, 8, 8), "odd": torch.zeros(1, 16, 2, 3, 4), "none": latent[:0]}
def decoded(samples):
    try:
        return vae.decode(samples)
    except errors.RequestError as error:
        return str(error)
tiles = {"tiling": "off", "tile_size": 64, "overlap": 0}
show(sampler={name: result(Sampler, model=model, **prompts, latent={"samples": found}, **settings) for name, found in LATENTS.items()},
     decode={name: result(Decode, samples={"samples": found}, vae=vae, **tiles) for name, found in LATENTS.items()},
     core={name: result(Decode, samples={"samples": found}, vae=core, **tiles) for name, found in LATENTS.items()},
     vae={name: decoded(found) for name, found in LATENTS.items()}, loads=host.local().status()["loads"])
""")
    assert shown.pop("loads") == 0
    words = {
        "ltxv": "the latent has 128 channels, so it is for another model; CogVideoX takes 16",
        "image": "a video latent is [batch, 16, frames, height/8, width/8]",
        "nan": "has values that are NaN or infinite",
        "both": "holds a NestedTensor; it must be one tensor of floats",
        "whole": "holds a torch.int64; it must be one tensor of floats",
        "wrapper": "frames before channels, as in the CogVideoX wrapper's nodes",
        "odd": "the size is 32x24; width and height must be multiples of 16",
        "none": "every dimension must be at least 1",
    }
    for lines in shown.values():
        for name, line in lines.items():
            assert words[name] in line and "\n" not in line, (name, line)


def test_an_image_latent_of_another_model_is_refused_for_its_own_reason(nodes):
    shown = nodes("""
positive = [[positive[0][0], {"concat_latent_image": torch.zeros(1, 128, 1, 3, 5)}]]
show(line=result(Sampler, model=model, positive=positive, negative=negative, latent={"samples": latent}, **settings))
""")
    assert shown["line"].startswith("the start image's latent is (1, 128, 1, 3, 5); it must be [1 or 1, 16, 1,")


def test_our_clip_and_vae_say_what_they_lack_and_run_where_a_core_node_puts_them(nodes):
    shown = nodes("""
from copy import copy
clip = part("nodes.comfy.clip").ClipHandle(checkpoint, "auto")
def asked(of, name):
    try:
        return str(getattr(of, name))
    except AttributeError as error:
        return f"{type(error).__name__}: {error}"
other = clip.clone()
other.patcher.load_device = torch.device("meta")
clip.encoder
moved, local = copy(vae), host.local
moved.patcher = vae.patcher.clone().deepclone_multigpu(new_load_device=torch.device("cpu", 1))
moved.first_stage_model, moved.device = moved.patcher.model, torch.device("cpu", 1)
used = []
host.local = lambda device=None: used.append(str(device)) or local()
images = [moved.decode(latent), vae.decode(latent), Decode.execute({"samples": latent}, moved, "off", 64, 0).result[0][None]]
said = []
host.say = lambda line, *rest, **more: said.append(line)
other.set_tokenizer_option("t5xxl_min_length", 300), other.set_tokenizer_option("mt5xl_min_length", 300), other.clip_layer(-1)
tokens = other.tokenize("a cat", images=[torch.ones(1)], llama_template="")
batch = torch.rand(2, 5, 16, 16, 3)
show(asked=[asked(of, "get_sd") for of in (clip, vae, vae.patcher)], has=[hasattr(clip, "get_sd"), hasattr(vae, "decode")],
     places=[str(of.patcher.load_device) for of in (clip, other, vae, moved)], one=other.encoder is clip.encoder,
     used=used[:3], same=[torch.equal(images[0], image) for image in images], said=said[:2], tokens=sorted(tokens),
     empty=torch.equal(clip.encode_from_tokens({"t5xxl": []}), clip.encode("")),
     batch=torch.equal(vae.encode(batch), torch.cat([vae.encode(video) for video in batch])))
""")
    lacks = "NotHere: this node needs 'get_sd', which the {} of Load CogVideoX does not have; use the core's {} here"
    vae = lacks.format("VAE", "VAELoader")
    assert shown["asked"] == [lacks.format("CLIP", "CLIPLoader (type cogvideox)"), vae, vae] and shown["has"] == [False, True]
    assert shown["places"] == ["cpu", "meta", "cpu", "cpu:1"] and shown["one"]
    assert shown["used"] == ["cpu:1", "cpu", "cpu:1"] and shown["same"] == [True] * 3
    assert shown["said"] == [
        "t5xxl_min_length is not used: every prompt has 32 tokens with CogVideoX",
        "not used: images; CogVideoX uses only the prompt",
    ]
    assert shown["tokens"] == ["t5xxl"] and shown["empty"] and shown["batch"]


def test_the_loader_takes_old_and_new_words_for_rounded_layers_and_refuses_two_at_once(nodes):
    shown = nodes("""
def rounded(**fast):
    try:
        load = prepared(part("nodes.loaders").LoadCogVideoX)
        return load.execute(model_name="demo", dtype="auto", offload="auto", **fast).result[0].model.quantization
    except errors.RequestError as error:
        return str(error)
show(found=[rounded(), rounded(fp8="linears"), rounded(fp8="all", quantize="fp8"), rounded(quantize="int8")],
     refused=[rounded(fp8="linears", quantize="int8"), rounded(quantize="int4")])
""")
    assert shown["found"] == ["off", "fp8", "fp8", "int8"]
    assert "both round the linear layers; set one of them to 'off'" in shown["refused"][0]
    assert "int4" in shown["refused"][1] and "int8" in shown["refused"][1]


def test_a_size_is_refused_by_the_names_of_the_inputs_and_the_sentence_is_shown_in_the_node(in_comfyui):
    shown, _ = in_comfyui(
        NODES
        + MORE
        + SHOWN
        + """
at("first", "5")
said = [result(Empty, **{**small, **wrong}) for wrong in ({"length": 10}, {"width": 20})]
said.append(result(VideoToVideo, vae=core, video=video, **{**small, "length": 6}))
show(said=said, shown=shown)
"""
    )
    length, width, other = shown["said"]
    assert length == "length is 10; it must be 4k+1, such as 9" and other == "length is 6; it must be 4k+1, such as 5"
    assert width == "width is 20; it must be a multiple of 16, such as 16"
    assert shown["shown"][0] == ["5", length]


def test_what_no_memory_holds_is_named_in_the_node_in_one_sentence(in_comfyui):
    shown, _ = in_comfyui(
        SHOWN
        + """
conditioning = part("nodes.conditioning")
conditioning.empty_latent = lambda **size: torch.empty(2**55)
at("first", "5")
try:
    conditioning.EmptyCogVideoXLatent.execute(4096, 4096, 1025, 64)
except errors.OutOfMemory as error:
    show(said=str(error), line=lines_of_last())
"""
    )
    assert shown["said"] == "134217728.0 GiB do not fit into main memory; use a smaller size, fewer frames or fewer videos"
    assert shown["line"][0].endswith("; use a smaller size, fewer frames or fewer videos")


def test_values_of_another_kind_in_a_saved_workflow_are_refused_in_one_sentence(in_comfyui):
    shown, _ = in_comfyui("""
backend, loaders, submission = part("nodes.backend").XDiTBackend, part("nodes.loaders").LoadCogVideoX, part("nodes.comfy.submission")
submission.remember({"prompt": {"1": {"inputs": {"devices": 9, "download": "off"}}}})
backend.hidden = loaders.hidden = types.SimpleNamespace(unique_id="1")
show(devices=backend.validate_inputs("auto"), models=[loaders.validate_inputs(name) for name in (3, {"a": 1}, ["a"])])
""")
    assert shown["devices"].startswith("devices '9': there is no GPU 9")
    assert all(said.startswith("there is no model '") for said in shown["models"])


def test_half_a_character_is_shown_in_a_node_as_a_question_mark(in_comfyui):
    """As of a file's name in another encoding, which the core sends as UTF-8."""
    shown, _ = in_comfyui(
        SHOWN
        + """
at("first", "5")
host.say("caf" + chr(0xDCE9))
show(lines=lines_of_last())
"""
    )
    assert shown["lines"] == ["caf?"]


def test_a_video_is_encoded_for_save_video_while_it_is_decoded(nodes):
    shown = nodes("""
import hashlib
saving, early, media = part("nodes.saving"), part("nodes.comfy.early_encoding"), part("parallel_backend.media.video")
def with_prompt(node, graph, unique_id):
    hidden = {io.Hidden.prompt: graph, io.Hidden.unique_id: unique_id, io.Hidden.extra_pnginfo: None}
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
encoded, encode = [], media.encode
media.encode = lambda frames, rate: encoded.append(len(frames)) or encode(frames, rate)
latent = {"samples": torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))}
tiles = {"tiling": "auto", "tile_size": 256, "overlap": 64}
def files(fps=8.0, link=["4", 0], videos=2, kept=lambda images: images):
    encoded.clear()
    saver = {"class_type": "XDiTSaveVideo", "inputs": {"images": link, "fps": fps, "filename_prefix": "a", "videos": videos}}
    graph = {"4": {"class_type": "XDiTCogVideoXVAEDecode", "inputs": {}}, "5": saver}
    images, = with_prompt(Decode, graph, "4").execute(samples=latent, vae=vae, **tiles).result
    images, rate = kept(images), fps if isinstance(fps, float) else 8.0
    ui = with_prompt(saving.SaveVideo, None, "5").execute(images, rate, "a", videos).ui
    hashes = [hashlib.md5((Path(folder) / one["filename"]).read_bytes()).hexdigest() for one in ui["images"]]
    return hashes, list(encoded)
def halved(images):
    [encoding.mp4() for encoding in early.of(images, 2)]  # else it might encode the halves
    return images.mul_(0.5)
with torch.inference_mode():
    show(early=files(), later=files(link=["9", 0]), at_24=files(24.0), linked=files(["7", 0]), one=files(videos=1),
         copy=files(kept=lambda images: images.clone()), changed=files(kept=halved), kept=len(early._kept))
""")
    same, whole = shown["early"][0], [9, 9]
    assert shown["early"][1] == shown["at_24"][1] == []  # nothing was encoded when it was saved
    for other in ("later", "linked", "copy"):
        assert shown[other] == [same, whole]
    assert len(shown["at_24"][0]) == 2 and shown["at_24"][0] != same
    assert shown["one"][1] == [18] and shown["changed"][1] == whole and shown["changed"][0] != same
    assert shown["kept"] == 0  # with the images
