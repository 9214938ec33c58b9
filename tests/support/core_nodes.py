"""A small prompt for every core node that takes CLIP, VAE, CONDITIONING, LATENT or IMAGE, and its result with this pack's.

A node that is in none of the tables must work. For a newer ComfyUI nodes may have to be added.
"""

import json

OURS = {"CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE"}
DEMO = {"dtype": "auto", "offload": "auto", "model_name": "demo"}
SIZE = {"width": 32, "height": 32}
SOURCES = {
    "demo": ("XDiTLoadCogVideoX", DEMO),
    "folder": ("XDiTLoadCogVideoX", {**DEMO, "model_name": "CogVideo/1.5-5b"}),
    "text": ("CLIPTextEncode", {"clip": ["folder", 1], "text": "a red circle"}),
    "latent": ("XDiTEmptyCogVideoXLatent", {**SIZE, "length": 5, "batch_size": 1}),
    "image": ("VAEDecode", {"samples": ["latent", 0], "vae": ["demo", 2]}),
    "picture": ("ImageFromBatch", {"image": ["image", 0], "batch_index": 0, "length": 1}),
    "model": ("UNETLoader", {"unet_name": "1.5-5b.safetensors", "weight_dtype": "default"}),
    "mask": ("SolidMask", {**SIZE, "value": 1.0}),
    "sigmas": ("ManualSigmas", {"sigmas": "1.0, 0.0"}),
    "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
    "noise": ("RandomNoise", {"noise_seed": 1}),
    "guider": ("BasicGuider", {"model": ["model", 0], "conditioning": ["text", 0]}),
    "audio": ("EmptyAudio", {"duration": 1.0, "sample_rate": 44100, "channels": 2}),
    "operation": ("LatentOperationTonemapReinhard", {"multiplier": 1.0}),
    "hooks": ("CreateHookLora", {"lora_name": "small.safetensors", "strength_model": 1.0, "strength_clip": 1.0}),
}
"""Nodes that make the inputs of other nodes. CLIP and VAE are the demo's; the text fits the core's MODEL."""
LINKS = {
    "CLIP": ["demo", 1],
    "VAE": ["demo", 2],
    "CONDITIONING": ["text", 0],
    "LATENT": ["latent", 0],
    "IMAGE": ["image", 0],
    "MODEL": ["model", 0],
    "MASK": ["mask", 0],
    "SIGMAS": ["sigmas", 0],
    "SAMPLER": ["sampler", 0],
    "NOISE": ["noise", 0],
    "GUIDER": ["guider", 0],
    "AUDIO": ["audio", 0],
    "LATENT_OPERATION": ["operation", 0],
    "HOOKS": ["hooks", 0],
}
SMALL = {**SIZE, "length": 5, "steps": 1}
"""Values for inputs whose defaults take long, by name."""
PICTURE = ["picture", 0]
VALUES = {
    "CLIPSetLastLayer": {"stop_at_clip_layer": -2},
    "SelectCLIPDevice": {"device": "cpu"},
    "CosmosImageToVideoLatent": {"start_image": PICTURE, "end_image": PICTURE},
    "CosmosPredict2ImageToVideoLatent": {"start_image": PICTURE, "end_image": PICTURE},
    "SaveImageDataSetToFolder": {"images": PICTURE},
    "SaveImageTextDataSetToFolder": {"images": PICTURE},
    "LayersFromBoundingBoxes": {"bboxes": "[]"},
    "CreateBoundingBoxes": {"editor_state": {"__value__": []}},
    "Preview3D": {"model_file": ""},
    "T5TokenizerOptions": {"min_padding": 1, "min_length": 300},
}
"""Values that replace the defaults."""
HEAVY = {("TextEncodeBooguEdit", "images")}
"""Optional inputs that are left out, because with them a node encodes a megapixel for another model."""

CANNOT_RUN = {
    "BACKGROUND_REMOVAL": "RemoveBackground",
    "CLIP_VISION": "CLIPVisionEncode SVD_img2vid_Conditioning ImageOnlyCheckpointSave StableZero123_Conditioning "
    "StableZero123_Conditioning_Batched SV3D_Conditioning Trellis2Conditioning Pixal3DConditioning TripoSplatConditioning",
    "CLIP_VISION_OUTPUT": "unCLIPConditioning TextEncodeHunyuanVideo_ImageToVideo",
    "CONTROL_NET": "ControlNetApply ControlNetApplyAdvanced ControlNetApplySD3 ControlNetInpaintingAliMamaApply",
    "DA3_MODEL": "DA3Inference",
    "DISPLAY, or EGL without one": "GLSLShader",
    "FACE_DETECTION_MODEL": "MediaPipeFaceLandmarker",
    "FACE_LANDMARKS": "MediaPipeFaceMeshVisualize",
    "GLIGEN": "GLIGENTextBoxApply",
    "INTERP_MODEL": "FrameInterpolate",
    "LATENT_UPSCALE_MODEL": "HunyuanVideo15LatentUpscaleWithModel LTXVLatentUpsampler",
    "MESH": "ApplyTextureToMesh",
    "LATENT of LTXV's video and audio": "LTXVSeparateAVLatent",
    "LATENT of Trellis 2": "Trellis2TextureStage",
    "MODEL of RT-DETR": "RTDETR_detect",
    "MODEL of SAM 3": "SAM3_Detect SAM3_VideoTrack",
    "MODEL of SeedVR2": "SeedVR2Conditioning",
    "MODEL_PATCH": "LTXVDurationPredictor QwenImageDiffsynthControlnet ZImageFunControlnet WanUni3CControlnetApply SUPIRApply "
    "AnimaLLLiteApply WanInfiniteTalkToVideo",
    "MOGE_MODEL": "MoGeInference MoGePanoramaInference",
    "OPTICAL_FLOW": "VOIDWarpedNoise",
    "PHOTOMAKER": "PhotoMakerEncode",
    "SAM3_TRACK_DATA": "SAM3_TrackPreview",
    "SHAPE_SUBDIVIDES": "VaeDecodeTextureTrellis",
    "SPLAT": "RenderSplat",
    "STYLE_MODEL": "StyleModelApply",
    "UPSCALE_MODEL": "ImageUpscaleWithModel",
    "VOXEL": "Trellis2ShapeStage",
}
"""Nodes that need something that the tests do not have, by what that is."""

REFUSED = {
    "CLIPAttentionMultiply": "'model_state_dict', which the CLIP of Load CogVideoX does not have; use the core's CLIPLoader",
    "CLIPMergeAdd": "'get_key_patches'",
    "CLIPMergeSimple": "'get_key_patches'",
    "CLIPMergeSubtract": "'get_key_patches'",
    "CLIPSave": "'load_model'",
    "CLIPSetLastLayer": "stop_at_clip_layer is -2; CogVideoX was trained on the text encoder's last layer: use -1",
    "CLIPTextEncodeHiDream": "a text encoder 'l', but CogVideoX has only T5-XXL; use CLIP Text Encode (Prompt)",
    "CLIPTextEncodeHunyuanDiT": "a text encoder 'mt5xl'",
    "CLIPTextEncodeKandinsky5": "a text encoder 'qwen25_7b'",
    "CLIPTextEncodeSDXL": "a text encoder 'l'",
    "CheckpointSave": "'load_model'",
    "LTXVAddGuide": "'downscale_index_formula'",
    "LTXVAudioVAEDecode": "'first_stage_model'",
    "LTXVAudioVAEEncode": "pixels has shape [1, 44100, 2]; images have",
    "LTXVEmptyLatentAudio": "'first_stage_model'",
    "LTXVImgToVideoInplace": "'downscale_index_formula'",
    "LTXVReferenceAudio": "pixels has shape [1, 44100, 2]; images have",
    "LoraLoader": "'cond_stage_model'",
    "LoraLoaderBypass": "'cond_stage_model'",
    "LoraSave": "'model_patches_models'",
    "SetClipHooks": "'register_all_hook_patches'",
    "StableCascade_StageC_VAEEncode": "'downscale_ratio', which the VAE of Load CogVideoX does not have; use the core's VAELoader",
    "TextGenerate": "'generate'",
    "TextGenerateLTX2Prompt": "'tokenizer'",
    "Trellis2UpsampleStage": "'prepare_decode'",
    "TripoSplatSamplingPreview": "'first_stage_model'",
    "VAEDecodeTripoSplat": "'first_stage_model'",
    "VAEEncodeAudio": "pixels has shape [1, 44100, 2]; images have",
    "VAESave": "'get_sd'",
    "VaeDecodeShapeTrellis": "'first_stage_model'",
    "VaeDecodeStructureTrellis2": "'prepare_decode'",
}
"""Nodes that this pack's CLIP or VAE refuses, with part of the message."""

OTHERS = {
    "HunyuanVideo15ImageToVideo": "Target sizes: [1, 32, ",
    "HunyuanVideo15SuperResolution": "Target sizes: [1, 16, ",
    "LTXVImgToVideo": "Target sizes: [1, 128, ",
    "MiniMaxH3AddGuide": "expects a MiniMax H3 AV latent",
    "SDPoseKeypointExtractor": "The provided model does not have a heatmap_head",
    "Wan22ImageToVideoLatent": "Target sizes: [1, 48, ",
}
"""Nodes for another model's latents. The core refuses or cannot use those of a CogVideoX VAE; with part of the message."""


def sockets(spec: list) -> set[str]:
    """Returns the types that an input takes, including those inside a growing input."""
    kind = kind_of(spec)
    return {name for name in OURS if f'"{name}"' in json.dumps(spec)} if kind == "COMFY_AUTOGROW_V3" else set(kind.split(","))


def kind_of(spec: list) -> str:
    return spec[0] if isinstance(spec[0], str) else "COMBO"


def names(info: dict) -> list[str]:
    """Returns the core's nodes that take this pack's objects and can be run."""
    left_out = {name for listed in CANNOT_RUN.values() for name in listed.split()}
    found = [
        name
        for name, node in info.items()
        if node["python_module"].startswith(("nodes", "comfy_extras"))
        and any(sockets(spec) & OURS for group in ("required", "optional") for spec in node["input"].get(group, {}).values())
    ]
    return [name for name in found if name not in left_out]


def values(name: str, spec: list, given: dict) -> dict:
    """Returns the values of an input, by its name and the names of the inputs inside it."""
    kind, options = kind_of(spec), spec[1] if len(spec) > 1 else {}
    if name in given:
        return {name: given[name]}
    if kind in LINKS:
        return {name: LINKS[kind]}
    if kind == "COMFY_DYNAMICCOMBO_V3":
        first = options["options"][0]
        inner = first["inputs"].get("required", {})
        return {
            name: first["key"],
            **{k: v for key, spec in inner.items() for k, v in values(f"{name}.{key}", spec, {}).items()},
        }
    if kind == "COMFY_AUTOGROW_V3":
        template = options["template"]
        ((key, inner),) = template["input"]["required"].items()
        count = max(template["min"], 1 if kind_of(inner) in OURS else 0)
        names = template.get("names") or [f"{template['prefix']}{number}" for number in range(count)]
        return {k: v for part in names[:count] for k, v in values(f"{name}.{part}", inner, {}).items()}
    if kind == "COMBO":
        choices = spec[0] if isinstance(spec[0], list) else options["options"]
        return {name: options.get("default", choices[0])}
    if kind == "INT" and name in SMALL:
        return {name: max(SMALL[name], options.get("min", 0))}
    return {
        name: options["default"] if "default" in options else {"STRING": "", "BOOLEAN": False}.get(kind, options.get("min", 0))
    }


def prompt(name: str, info: dict) -> dict:
    """Returns a prompt of a node and the nodes that it needs."""
    node, inputs = info[name], {}
    for group in ("required", "optional"):
        for key, spec in node["input"].get(group, {}).items():
            if (name, key) in HEAVY or group == "optional" and kind_of(spec) == "VAE" and name.startswith("TextEncode"):
                continue
            if group == "required" or kind_of(spec) in LINKS:
                inputs |= values(key, spec, VALUES.get(name, {}))
    made = {key: {"class_type": kind, "inputs": given} for key, (kind, given) in SOURCES.items()}
    made["node"] = {"class_type": name, "inputs": inputs}
    if node["output"]:
        made["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return made


def ending(server, name: str, info: dict) -> str:
    """Runs a node. Returns "works", or the type and message of its error."""
    last = list(server.events(server.queue(prompt(name, info))))[-1]
    if last["type"] == "execution_success":
        return "works"
    assert last["data"]["node_id"] == "node", last
    kind = last["data"]["exception_type"].rpartition(".")[2]
    return f"{kind}: {last['data']['exception_message'].strip()}"


def is_expected(name: str, ended: str) -> bool:
    """Returns whether a node's result is the one in the tables."""
    if name in REFUSED:
        return ended.startswith("CogVideoXError: ") and REFUSED[name] in ended and "\n" not in ended
    return OTHERS[name] in ended if name in OTHERS else ended == "works"
