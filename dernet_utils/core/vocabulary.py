"""The package's vocabulary: the dataset's terms, names of networks, colours, the notice."""

# The dataset ------------------------------------------------------------------------------------

SPLITS = ("train", "test")
NO_FINDING = "No finding"
# The seven types of the paper's Table 3, in the dataset's spelling, and the paper's codes.
PAPER_CODES = {
    "Disc space narrowing": "LT2",
    "Foraminal stenosis": "LT4",
    "Osteophytes": "LT6",
    "Spondylolysthesis": "LT8",
    "Surgical implant": "LT10",
    "Vertebral collapse": "LT11",
    "Other lesions": "LT13",
}
LESION_TYPES = tuple(PAPER_CODES)
# The radiologists marked thirteen types (Nguyen et al., MICCAI 2021). These six, numbers 1, 3,
# 5, 7, 9 and 12 of the paper's codes, are rare and count as "Other lesions".
RARER_TYPES = (
    "Ankylosis",
    "Enthesophytes",
    "Fracture",
    "Sclerotic lesion",
    "Subchondral sclerosis",
    "Foreign body",
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")
ANNOTATION_COLUMNS = ("study_id", "series_id", "image_id", "rad_id", "lesion_type", *CORNERS)

# Networks ---------------------------------------------------------------------------------------

NETWORKS = ("densenet121", "tf_efficientnetv2_s", "resnet50")  # paper, section 3.2; timm's names
NETWORK_NAMES = {
    "densenet121": "DenseNet121",
    "tf_efficientnetv2_s": "EfficientNetV2-S",
    "resnet50": "ResNet50",
}

# What readers see -------------------------------------------------------------------------------

# One colour per lesion type, the same in every chapter: Okabe and Ito's palette, distinguishable
# with any colour vision. Each type also has its own dash pattern, legible in a grey print.
LESION_STYLE = {
    "Disc space narrowing": ("#56B4E9", "-"),
    "Foraminal stenosis": ("#CC79A7", "--"),
    "Osteophytes": ("#E69F00", "-"),
    "Spondylolysthesis": ("#009E73", "--"),
    "Surgical implant": ("#F0E442", "-"),
    "Vertebral collapse": ("#D55E00", "-."),
    "Other lesions": ("#FFFFFF", ":"),
}
NOTICE = "For research and teaching, not for diagnosis"
