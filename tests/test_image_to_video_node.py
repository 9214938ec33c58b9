"""The start image on its way through the nodes: encoded once, carried as the core carries it, read by the sampler."""


def test_the_start_image_is_covered_encoded_once_and_gives_what_a_job_with_it_gives(nodes):
    shown, log = nodes("""
model, vae = handles(image_model)
conditioned = call(Node, **prompts, vae=vae, start_image=picture, **size)
concat = [prompt[0][1]["concat_latent_image"] for prompt in conditioned[:2]]
latent = conditioned[2]["samples"]
sampled = call(Sampler, model=model, positive=conditioned[0], negative=conditioned[1], latent=conditioned[2], **settings)
encoded = host.local().encode(jobs.EncodeJob(model.model, image.cover(picture[:1], width=96, height=64))).tensor
job = jobs.SampleJob(model.model, positive[0][0], latent, negative[0][0], seed=3, steps=2, image=encoded)
expected = host.local().sample(job).tensor
show(shape=list(latent.shape), empty=not latent.any(), concat=list(concat[0].shape), once=concat[0] is concat[1],
     equal=torch.equal(sampled[0]["samples"], expected), kept="concat_latent_image" in positive[0][1])
""")
    assert shown == {
        "shape": [2, 16, 3, 8, 12],
        "empty": True,
        "concat": [1, 16, 1, 8, 12],
        "once": True,
        "equal": True,
        "kept": False,
    }
    assert "does not use" not in log  # the sampler uses what the conditioning carries


def test_without_an_image_it_is_an_empty_latent_for_a_text_model(nodes):
    shown, _ = nodes("""
model, vae = handles(text_model)
conditioned = call(Node, **prompts, vae=vae, **size)
sampled = call(Sampler, model=model, positive=conditioned[0], negative=conditioned[1], latent=conditioned[2], **settings)
show(same=conditioned[0] is positive, shape=list(sampled[0]["samples"].shape))
""")
    assert shown == {"same": True, "shape": [2, 16, 3, 8, 12]}


def test_what_does_not_fit_is_named_in_one_line_and_nothing_is_loaded(nodes):
    shown, _ = nodes("""
(text, vae), (i2v, _) = handles(text_model), handles(image_model)
with_image = call(Node, **prompts, vae=vae, start_image=picture, **size)
other = call(Node, **prompts, vae=vae, start_image=picture, **{**size, "width": 80, "height": 48})
before = host.local().status()["loads"]
def sample_with(model, found, latent):
    return refusal(Sampler, model=model, positive=found[0], negative=found[1], latent=latent, **settings)
show(
    text_model=sample_with(text, with_image, with_image[2]),
    image_model=sample_with(i2v, (positive, negative), with_image[2]),
    sizes=sample_with(i2v, other, with_image[2]),
    learned=sample_with(i2v, other, other[2]),
    wrapper_vae=refusal(Node, **prompts, vae=object(), start_image=picture, **size),
    wrapper_prompt=refusal(Node, positive=positive[0][0], negative=negative, vae=vae, start_image=picture, **size),
    width=refusal(Node, **prompts, vae=vae, start_image=picture, **{**size, "width": 100}),
    loads=host.local().status()["loads"] - before,
)
""")
    assert shown.pop("loads") == 0
    words = {
        "text_model": "makes videos from text alone; for a start image use",
        "image_model": "needs a start image (CogVideoX Image To Video, or --image)",
        "sizes": "encoded for 80x48 and the video is 96x64",
        "learned": "has learned positions for 96x64 only",
        "wrapper_vae": "this VAE comes from the CogVideoX wrapper",
        "wrapper_prompt": "positive comes from the CogVideoX wrapper",
        "width": "width is 100; it must be a multiple of 16",
    }
    for name, line in shown.items():
        assert words[name] in line and "\n" not in line, (name, line)


def test_the_sampler_takes_timesteps_by_hand_and_the_core_s_noise(nodes):
    shown, _ = nodes("""
model, _ = handles(text_model)
size = {"width": 96, "height": 64, "frames": 9}
empty = {"samples": jobs.empty_latent(**size)}
class Random:
    seed = 7
    def generate_noise(self, latent):
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))
given = {"model": model, **prompts, "latent": empty, **settings, "scheduler": "ddim"}
found = call(Sampler, **given, timesteps="999, 856 399", noise=Random())[0]["samples"]
fields = {"seed": 3, "steps": 3, "scheduler": "ddim", "timesteps": (999, 856, 399), "noise": Random().generate_noise(empty)}
job = jobs.SampleJob(model.model, positive[0][0], empty["samples"], negative[0][0], **fields)
show(equal=torch.equal(found, host.local().sample(job).tensor), words=refusal(Sampler, **given, timesteps="999, x"),
     noise=refusal(Sampler, **given, noise=5))
""")
    assert shown["equal"]
    assert shown["words"] == "timesteps are '999, x'; use whole numbers such as 999, 856, 665, 399"
    assert shown["noise"] == "noise is 5; connect the core's RandomNoise or another node that makes noise"
