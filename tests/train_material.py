"""What the tests of `vitkernels train` share: tiny runs, and folders of images."""

from cli_material import gradient, run

TINY = (
    "--data", "digits", "--model", "vit_tiny_patch4_8", "--model-kwargs", "embed_dim=16", "depth=1",
    "num_heads=2", "--batch", "256", "--warmup-epochs", "0", "--workers", "0", "--threads", "1",
)  # fmt: skip
FOLDER = (
    "--model", "vit_tiny_patch8_32", "--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2",
    "--batch", "2", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--threads", "1",
)  # fmt: skip


def train(capsys, *arguments):
    return run(capsys, "train", *arguments)


def image_folder(root, classes=("cat", "dog"), each=6, size=40):
    """Class folders of smooth pictures; those of the second class are darker."""
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(each):
            picture = gradient(size + k, size).point(lambda v, i=i: v // (1 + 2 * i))
            picture.save(root / name / f"{k}.png")
    return root
