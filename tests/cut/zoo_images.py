"""Models of torchvision and timm for ``make zoo``."""

import torch
from zoo_cases import Case

from flsplit.vision import load_torchvision

RNG = torch.Generator().manual_seed(1)
SMALL, IMAGE, LARGE = ((torch.randn(2, 3, size, size, generator=RNG),) for size in (64, 224, 299))


def torchvision_cases():
    tv = load_torchvision().models

    def classifier(name, **options):
        return lambda: getattr(tv, name)(num_classes=5, **options)

    def segmenter(name, **options):
        build, none = getattr(tv.segmentation, name), {"weights": None, "weights_backbone": None}
        return lambda: build(**none, **options)

    def single(build, cuts, image=SMALL):
        return Case(build, cuts, image, double=False)

    return {
        "resnet18": single(
            classifier("resnet18"),
            ["conv1", "layer1.0.conv1", "layer2", "layer2.0.downsample", "layer3.1.bn1",
             "layer4.1.relu#2", "avgpool"],
        ),
        "vit": single(
            lambda: tv.VisionTransformer(64, 16, 2, 2, 32, 64, dropout=0.1),
            ["conv_proj", "encoder.layers.encoder_layer_0",
             "encoder.layers.encoder_layer_0.self_attention"],
        ),
        "vgg11": single(classifier("vgg11"), ["features.7", "classifier.2"]),
        "densenet121": single(
            classifier("densenet121"), ["features.denseblock1.denselayer4", "features.transition1"]
        ),
        "densenet121, checkpoints": single(
            classifier("densenet121", memory_efficient=True), ["features.denseblock1.denselayer4"]
        ),
        "googlenet": single(
            classifier("googlenet", init_weights=False), ["inception3a", "inception4c"]
        ),
        "inception": single(classifier("inception_v3", init_weights=False), ["Mixed_5b"], LARGE),
        "mobilenet_v3_small": single(
            classifier("mobilenet_v3_small"), ["features.4", "features.12.0"]
        ),
        "mnasnet0_5": single(classifier("mnasnet0_5"), ["layers.8"]),
        "efficientnet_b0": single(
            classifier("efficientnet_b0"), ["features.3", "features.2.0.block.1"]
        ),
        "swin_t": single(classifier("swin_t"), ["features.1", "features.2.norm"]),
        "convnext_tiny": single(classifier("convnext_tiny"), ["features.1", "features.3.1"]),
        "shufflenet": single(classifier("shufflenet_v2_x0_5"), ["stage2.1"]),
        "deeplab": single(segmenter("deeplabv3_resnet50"), ["backbone.layer1"]),
        "fcn": single(segmenter("fcn_resnet50", aux_loss=True), ["backbone.layer3"]),
    }  # fmt: skip


def timm_cases():
    load_torchvision()
    import timm

    def case(name, cut):
        build = {"num_classes": 5} | ({} if name.startswith("mobile") else {"drop_path_rate": 0.1})
        return Case(lambda: timm.create_model(name, **build), [cut], IMAGE, double=False)

    cuts = {
        "convnext_atto": "stages.0",
        "vit_tiny_patch16_224": "blocks.1",
        "eva02_tiny_patch14_224": "blocks.1",
        "swin_tiny_patch4_window7_224": "layers.0",
        "mobilenetv3_small_050": "blocks.1",
        "regnetx_002": "s1",
        "mixer_s32_224": "blocks.1",
    }
    return {f"timm {name}": case(name, cut) for name, cut in cuts.items()}
