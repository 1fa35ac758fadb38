"""Names of microsoft/GLIP and of mmdet for the settings of glip.config.

Every key of microsoft/GLIP's defaults.py at 9dda955 stands here, so that its YAML files and the
configs that it writes out are read. A key for which we have a setting sets it. One whose value
could make another network or another training out of it is taken with the value that we have,
and refused with any other. One that nothing reads with those values is taken with any. Options
are those of Ascend ModelZoo-PyTorch's scripts and of tools/train_net.py there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from zoo_common.config import CardKey, CardOptions, Given
from zoo_common.errors import UserError
from zoo_common.options import is_true

DATA_SETS = {
    f"coco_{name}": (f"annotations/instances_{split}{year}.json", f"{split}{year}")
    for name, split, year in (
        ("grounding_train", "train", "2017"),
        ("2017_train", "train", "2017"),
        ("2017_val", "val", "2017"),
        ("2014_train", "train", "2014"),
        ("2014_val", "val", "2014"),
    )
}
"""What microsoft/GLIP calls a split: its annotations and its images, from data.path."""

PRETRAINING = frozenset({"object365_dt_train", "mixed_train_no_coco", "flickr30k_train"})
"""Data sets of its published YAML files, which its commands for COCO replace."""

EVALUATES = "--evaluates"
"""What runs that evaluate give in test/runs.yaml: names of weights and batches mean theirs."""


def _truth(value: Any, name: str = "") -> bool:
    found = is_true(str(value))
    if found is None:
        raise ValueError(f"{name}{value!r} is neither true nor false.")
    return found


def _opt_level(value: Any, given: Given) -> Mapping[str, Any]:
    return {"precision.opt_level": "O1" if _truth(value) else "O0"}


def _weights(value: Any, given: Given) -> Mapping[str, Any]:
    """A path, a bare name, or an address."""
    return {"weights.checkpoint" if EVALUATES in given else "weights.start": value}


def _batch_size(value: Any, given: Given) -> Mapping[str, Any]:
    return {"evaluate.batch_size" if EVALUATES in given else "data.batch_size": value}


def _early_stop(value: Any, given: Given) -> Mapping[str, Any]:
    """The original's -1 stands for none."""
    return {"solver.early_stop": 0 if value == -1 else value}


def _device(value: Any, given: Given) -> Mapping[str, Any]:
    kind, colon, index = str(value).partition(":")
    if not colon:
        return {"run.device": kind}
    if not index.isdecimal():
        raise ValueError(f"{value!r} is no device: write npu, npu:0, cuda or cpu.")
    return {"run.device": kind, "run.device_id": int(index)}


def _drop_block(value: Any, given: Given) -> Mapping[str, Any]:
    """The noise's switch and its probability say one thing together."""
    switched = _truth(given.get("MODEL.FPN.DROP_BLOCK", True), "MODEL.FPN.DROP_BLOCK: ")
    return {"model.drop_block": given.get("MODEL.FPN.DROP_PROB", 0.3) if switched else 0.0}


def _clip(value: Any, given: Given) -> Mapping[str, Any]:
    """Clipping's switch and its norm say one thing together."""
    name = "SOLVER.CLIP_GRADIENTS"
    switched = _truth(given.get(f"{name}.ENABLED", False), f"{name}.ENABLED: ")
    return {"precision.clip_grad": given.get(f"{name}.CLIP_VALUE", 0.0) if switched else 0.0}


def _disable_shuffle(value: Any, given: Given) -> Mapping[str, Any]:
    return {"data.shuffle_classes": not _truth(value)}


def _negatives(value: Any, given: Given) -> Mapping[str, Any]:
    """COCO's captions have all classes unless the safeguard is on."""
    name = "DATASETS.SPECIAL_SAFEGUARD_FOR_COCO_GROUNDING"
    if not _truth(given.get(name, False), f"{name}: "):
        return {"data.negatives": -1}
    return {"data.negatives": given.get("DATASETS.RANDOM_SAMPLE_NEG", -1)}


def _sizes(value: Any, given: Given) -> Mapping[str, Any]:
    """Several short sides, where they are given, go before the one."""
    several = given.get("AUGMENT.MULT_MIN_SIZE_TRAIN") or given.get("INPUT.MIN_SIZE_TRAIN", 800)
    return {"data.min_sizes": several if isinstance(several, list) else [several]}


def _divisibility(value: Any, given: Given) -> Mapping[str, Any]:
    """Upstream's 0 stands for no padding beyond the batch's largest image."""
    if value == 0:
        raise ValueError("0 is not supported: padded sizes are multiples of 32 at least.")
    return {"data.size_divisibility": value}


def _chunk(value: Any, given: Given) -> Mapping[str, Any]:
    """Upstream's -1 puts all classes into one caption; here it is as many as fit."""
    return {"evaluate.chunk": 0 if value == -1 else value}


def _during_training(value: Any, given: Given) -> Mapping[str, Any]:
    """Upstream evaluates then whenever it saves."""
    every = given.get("SOLVER.CHECKPOINT_PERIOD", 2500) if _truth(value) else 0
    return {"evaluate.every": every}


def _data_set(split: str) -> CardKey:
    paths = (f"data.{split}_json", f"data.{split}_images")

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        names = [value] if isinstance(value, str) else list(value or [])
        if not names or set(names) <= PRETRAINING:
            return {}
        if len(names) > 1 or names[0] not in DATA_SETS:
            raise ValueError(
                f"{', '.join(map(str, names))} is none of {', '.join(DATA_SETS)}: name other data "
                f"by {paths[0]} and {paths[1]}."
            )
        return dict(zip(paths, DATA_SETS[names[0]], strict=True))

    return CardKey(paths, read)


def _only(*built: Any) -> CardKey:
    """A key that is taken with certain values only: those that are built here."""

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        found = value
        if isinstance(built[0], bool) and isinstance(value, str):
            found = is_true(value)
        if found not in built:
            raise ValueError(f"{value!r} is not supported, only {' or '.join(map(repr, built))}.")
        return {}

    return CardKey((), read)


def _unread(value: Any, given: Given) -> Mapping[str, Any]:
    return {}


def _unread_keys(names: Mapping[str, str]) -> dict[str, CardKey]:
    return {
        f"{section}.{name}": CardKey((), _unread)
        for section, listed in names.items()
        for name in listed.split()
    }


def _instead(advice: str) -> CardKey:
    """An option of the original that has no meaning here; the message says what to do."""

    def read(value: Any, given: Given) -> Mapping[str, Any]:
        raise ValueError(f"there is no such option here: {advice}.")

    return CardKey((), read, bare="true")


OPTIONS: CardOptions = {
    "--batch_size": CardKey(
        ("data.batch_size", "evaluate.batch_size"),
        _batch_size,
        help="images a step over all cards together; in an evaluation, on each card",
    ),
    "--load_from": CardKey(
        ("weights.start", "weights.checkpoint"),
        _weights,
        literal=False,
        help="weights to start from, or to evaluate: a .pth file, its address, or its bare name",
    ),
    "--early_stop_iteration": CardKey(
        ("solver.early_stop",), _early_stop, help="stop after this many steps, with evaluation"
    ),
    "--disable_output_distributed": CardKey((), _unread, bare="true"),
    "--save_original_config": CardKey((), _unread, bare="true"),
    "--use-tensorboard": _instead("metrics.jsonl in --output_dir holds all numbers"),
    "--local_rank": _instead("the scripts start their processes themselves"),
    "--world-size": _instead("the script's name says how many cards, or --processes"),
    "--dist-url": _instead("--master_addr and --master_port say where the processes meet"),
    "--task_config": _instead("data.path, data.val_json and data.val_images name the data"),
    EVALUATES: CardKey((), _unread, bare="true"),
}
"""Options of the original's scripts and programs."""


def _channels(value: Any, given: Given) -> Mapping[str, Any]:
    names = ("MODEL.BACKBONE.OUT_CHANNELS", "MODEL.DYHEAD.CHANNELS")
    both = {given[name] for name in names if name in given}
    if len(both) > 1:
        raise ValueError(f"{value!r} is not supported, only {' and '.join(names)} alike.")
    return {"model.channels": value}


def _fused_words(value: Any, given: Given) -> Mapping[str, Any]:
    """What the words are taken from; fusion's switch decides it."""
    if _truth(value) != _truth(given.get(f"{_FUSE}.EARLY_FUSE_ON", value)):
        raise ValueError(f"{value!r} is not supported, only what {_FUSE}.EARLY_FUSE_ON is.")
    return {}


_FUSE = "MODEL.DYHEAD.FUSE_CONFIG"
_LANGUAGE = "MODEL.LANGUAGE_BACKBONE"

SETTINGS: CardOptions = {
    "MODEL.WEIGHT": CardKey(("weights.start", "weights.checkpoint"), _weights, literal=False),
    "MODEL.DEVICE": CardKey(("run.device", "run.device_id"), _device),
    "MODEL.BACKBONE.OUT_CHANNELS": CardKey(("model.channels",), _channels),
    "MODEL.FPN.DROP_BLOCK": CardKey(("model.drop_block",), _drop_block),
    "MODEL.FPN.DROP_PROB": CardKey(("model.drop_block",), _drop_block),
    "MODEL.SWINT.EMBED_DIM": "model.swin_width",
    "MODEL.SWINT.DEPTHS": "model.swin_depths",
    "MODEL.SWINT.NUM_HEADS": "model.swin_heads",
    "MODEL.SWINT.WINDOW_SIZE": "model.swin_window",
    "MODEL.SWINT.DROP_PATH_RATE": "model.drop_path",
    f"{_LANGUAGE}.MODEL_PATH": "model.bert",
    f"{_LANGUAGE}.TOKENIZER_PATH": "model.bert",
    f"{_LANGUAGE}.MAX_QUERY_LEN": "model.max_tokens",
    "MODEL.DYHEAD.CHANNELS": CardKey(("model.channels",), _channels),
    "MODEL.DYHEAD.NUM_CONVS": "model.tower_blocks",
    f"{_FUSE}.EARLY_FUSE_ON": "model.fusion",
    f"{_FUSE}.TOKEN_ALPHA": "loss.alpha",
    f"{_FUSE}.TOKEN_GAMMA": "loss.gamma",
    "MODEL.ATSS.REG_LOSS_WEIGHT": "loss.box_weight",
    "MODEL.ATSS.TOPK": "loss.candidates",
    "MODEL.ATSS.INFERENCE_TH": "test.score_thr",
    "MODEL.ATSS.PRE_NMS_TOP_N": "test.nms_pre",
    "MODEL.ATSS.NMS_TH": "test.nms_thr",
    "MODEL.ATSS.DETECTIONS_PER_IMG": "test.max_per_img",
    "INPUT.PIXEL_MEAN": "model.pixel_mean",
    "INPUT.PIXEL_STD": "model.pixel_std",
    "INPUT.MIN_SIZE_TRAIN": CardKey(("data.min_sizes",), _sizes),
    "INPUT.MAX_SIZE_TRAIN": "data.max_size",
    "INPUT.MIN_SIZE_TEST": "data.min_size_test",
    "INPUT.MAX_SIZE_TEST": "data.max_size_test",
    "AUGMENT.MULT_MIN_SIZE_TRAIN": CardKey(("data.min_sizes",), _sizes),
    "AUGMENT.FLIP_PROB_TRAIN": "data.flip",
    "DATASETS.TRAIN": _data_set("train"),
    "DATASETS.TEST": _data_set("val"),
    "DATASETS.RANDOM_SAMPLE_NEG": CardKey(("data.negatives",), _negatives),
    "DATASETS.SPECIAL_SAFEGUARD_FOR_COCO_GROUNDING": CardKey(("data.negatives",), _negatives),
    "DATASETS.DISABLE_SHUFFLE": CardKey(("data.shuffle_classes",), _disable_shuffle),
    "DATALOADER.NUM_WORKERS": "data.workers",
    "DATALOADER.ASPECT_RATIO_GROUPING": "data.group_by_aspect",
    "DATALOADER.SIZE_DIVISIBILITY": CardKey(("data.size_divisibility",), _divisibility),
    "SOLVER.USE_AMP": CardKey(("precision.opt_level",), _opt_level),
    "SOLVER.IMS_PER_BATCH": "data.batch_size",
    "SOLVER.MAX_EPOCH": "solver.max_epoch",
    "SOLVER.MAX_ITER": "solver.max_iter",
    "SOLVER.BASE_LR": "solver.base_lr",
    "SOLVER.LANG_LR": "solver.lang_lr",
    "SOLVER.BACKBONE_BODY_LR_FACTOR": "solver.backbone_lr_factor",
    "SOLVER.BIAS_LR_FACTOR": "solver.bias_lr_factor",
    "SOLVER.WEIGHT_DECAY": "solver.weight_decay",
    "SOLVER.WEIGHT_DECAY_BIAS": "solver.weight_decay_bias",
    "SOLVER.WEIGHT_DECAY_NORM_FACTOR": "solver.weight_decay_norm_factor",
    "SOLVER.STEPS": "solver.steps",
    "SOLVER.GAMMA": "solver.gamma",
    "SOLVER.WARMUP_ITERS": "solver.warmup_iters",
    "SOLVER.WARMUP_FACTOR": "solver.warmup_factor",
    "SOLVER.WARMUP_METHOD": "solver.warmup_method",
    "SOLVER.MODEL_EMA": "solver.ema",
    "SOLVER.USE_EMA_FOR_MONITOR": "evaluate.ema",
    "SOLVER.CHECKPOINT_PERIOD": "solver.checkpoint_every",
    "SOLVER.CLIP_GRADIENTS.ENABLED": CardKey(("precision.clip_grad",), _clip),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": CardKey(("precision.clip_grad",), _clip),
    "SOLVER.SEED": "run.seed",
    "TEST.DURING_TRAINING": CardKey(("evaluate.every",), _during_training),
    "TEST.CHUNKED_EVALUATION": CardKey(("evaluate.chunk",), _chunk),
    "OUTPUT_DIR": "run.output_dir",
}
"""Keys that set something."""

FIXED: CardOptions = {
    "MODEL.META_ARCHITECTURE": _only("GeneralizedVLRCNN"),
    "MODEL.RPN_ARCHITECTURE": _only("VLDYHEAD"),
    "MODEL.RPN_ONLY": _only(True),
    "MODEL.MASK_ON": _only(False),
    "MODEL.KEYPOINT_ON": _only(False),
    "MODEL.LINEAR_PROB": _only(False),
    "MODEL.BACKBONE.CONV_BODY": _only("SWINT-FPN-RETINANET"),
    "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": _only(-1),
    "MODEL.BACKBONE.FREEZE": _only(False),
    "MODEL.SWINT.VERSION": _only("v1"),
    "MODEL.SWINT.MLP_RATIO": _only(4),
    "MODEL.SWINT.APE": _only(False),
    "MODEL.FPN.FREEZE": _only(False),
    "MODEL.FPN.DROP_SIZE": _only(3),
    "MODEL.FPN.USE_GN": _only(False),
    "MODEL.FPN.USE_RELU": _only(False),
    "MODEL.FPN.USE_DYRELU": _only(False),
    "MODEL.FPN.USE_SPP": _only(False),
    "MODEL.FPN.USE_PAN": _only(False),
    "MODEL.FPN.USE_DYHEAD": _only(False),
    "MODEL.FPN.RETURN_SWINT_FEATURE_BEFORE_FUSION": _only(False),
    "MODEL.GROUP_NORM.NUM_GROUPS": _only(16),
    "MODEL.GROUP_NORM.DIM_PER_GP": _only(-1),
    "MODEL.GROUP_NORM.EPSILON": _only(1e-5),
    f"{_LANGUAGE}.MODEL_TYPE": _only("bert-base-uncased"),
    f"{_LANGUAGE}.TOKENIZER_TYPE": _only("bert-base-uncased"),
    f"{_LANGUAGE}.WEIGHT": _only(""),
    f"{_LANGUAGE}.FREEZE": _only(False),
    f"{_LANGUAGE}.N_LAYERS": _only(1),
    f"{_LANGUAGE}.MASK_SPECIAL": _only(False),
    f"{_LANGUAGE}.PAD_MAX": _only(True),
    "MODEL.RPN.USE_FPN": _only(True),
    "MODEL.RPN.FREEZE": _only(False),
    "MODEL.RPN.FORCE_BOXES": _only(False),
    "MODEL.RPN.ANCHOR_SIZES": _only([64, 128, 256, 512, 1024]),
    "MODEL.RPN.ANCHOR_STRIDE": _only([8, 16, 32, 64, 128]),
    "MODEL.RPN.ASPECT_RATIOS": _only([1.0]),
    "MODEL.RPN.SCALES_PER_OCTAVE": _only(1),
    "MODEL.RPN.ANCHOR_SHIFT": _only([0.0, 0.0, 0.0, 0.0]),
    "MODEL.RPN.USE_RELATIVE_SIZE": _only(False),
    "MODEL.RPN.RETURN_FUSED_FEATURES": _only(False),
    "MODEL.DYHEAD.USE_GN": _only(True),
    "MODEL.DYHEAD.USE_NSYNCBN": _only(False),
    "MODEL.DYHEAD.USE_SYNCBN": _only(False),
    "MODEL.DYHEAD.USE_DYRELU": _only(True),
    "MODEL.DYHEAD.USE_DFCONV": _only(True),
    "MODEL.DYHEAD.USE_DYFUSE": _only(True),
    "MODEL.DYHEAD.CONV_FUNC": _only(""),
    "MODEL.DYHEAD.COSINE_SCALE": _only(-1.0),
    "MODEL.DYHEAD.LOG_SCALE": _only(0.0),
    "MODEL.DYHEAD.PRIOR_PROB": _only(0.01),
    "MODEL.DYHEAD.SCORE_AGG": _only("MEAN"),
    f"{_FUSE}.TYPE": _only("MHA-B"),
    f"{_FUSE}.SEPARATE_BIDIRECTIONAL": _only(False),
    f"{_FUSE}.STABLE_SOFTMAX_2D": _only(False),
    f"{_FUSE}.USE_CLASSIFICATION_LOSS": _only(False),
    f"{_FUSE}.USE_TOKEN_LOSS": _only(False),
    f"{_FUSE}.USE_CONTRASTIVE_ALIGN_LOSS": _only(False),
    f"{_FUSE}.USE_DOT_PRODUCT_TOKEN_LOSS": _only(True),
    f"{_FUSE}.DOT_PRODUCT_TOKEN_LOSS_WEIGHT": _only(1.0),
    f"{_FUSE}.USE_FUSED_FEATURES_DOT_PRODUCT": CardKey((), _fused_words),
    f"{_FUSE}.USE_LAYER_SCALE": _only(True),
    f"{_FUSE}.CLAMP_MIN_FOR_UNDERFLOW": _only(True),
    f"{_FUSE}.CLAMP_MAX_FOR_OVERFLOW": _only(True),
    f"{_FUSE}.CLAMP_BERTATTN_MIN_FOR_UNDERFLOW": _only(True),
    f"{_FUSE}.CLAMP_BERTATTN_MAX_FOR_OVERFLOW": _only(True),
    f"{_FUSE}.CLAMP_DOT_PRODUCT": _only(True),
    f"{_FUSE}.MLM_LOSS": _only(False),
    f"{_FUSE}.USE_SHALLOW_CONTRASTIVE_LOSS": _only(False),
    f"{_FUSE}.USE_BACKBONE_SHALLOW_CONTRASTIVE_LOSS": _only(False),
    f"{_FUSE}.ADD_LINEAR_LAYER": _only(False),
    "INPUT.TO_BGR255": _only(True),
    "INPUT.FORMAT": _only("", "bgr255"),
    "INPUT.FIX_RES": _only(False),
    "AUGMENT.USE_RA": _only(0),
    "DATASETS.CLASS_AGNOSTIC": _only(False),
    "DATASETS.USE_CROWD": _only(False),
    "DATASETS.FEW_SHOT": _only(0),
    "DATASETS.MAX_BOX": _only(-1),
    "DATASETS.ADD_DET_PROMPT": _only(False),
    "DATASETS.SEPARATION_TOKENS": _only(". "),
    "DATASETS.ONE_HOT": _only(False),
    "DATASETS.USE_CAPTION_PROMPT": _only(False),
    "DATASETS.USE_OVERRIDE_CATEGORY": _only(False),
    "DATASETS.USE_SUPRESS_QUERY": _only(False),
    "DATASETS.ALTERNATIVE_TRAINING": _only(False),
    "DATASETS.MULTISTAGE_TRAINING": _only(False),
    "SOLVER.OPTIMIZER": _only("ADAMW"),
    "SOLVER.GRAD_CLIP": _only(0.0),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _only("full_model"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _only(2.0),
    "SOLVER.MULTI_MAX_EPOCH": _only([]),
    "SOLVER.USE_COSINE": _only(False),
    "SOLVER.USE_AUTOSTEP": _only(False),
    "SOLVER.CHECKPOINT_PER_EPOCH": _only(-1.0),
    "SOLVER.AUTO_TERMINATE_PATIENCE": _only(-1),
    "SOLVER.WEIGHT_DECAY_SCHEDULE": _only(False),
    "SOLVER.TUNING_HIGHLEVEL_OVERRIDE": _only(None),
    "SOLVER.PROMPT_PROBING_LEVEL": _only(-1.0),
    "TEST.USE_MULTISCALE": _only(False),
    "TEST.EVAL_TASK": _only("", "detection"),
    "TEST.SUBSET": _only(-1),
    "TEST.MDETR_STYLE_AGGREGATE_CLASS_NUM": _only(-1),
    "GLIPKNOW.KNOWLEDGE_FILE": _only(""),
    "GLIPKNOW.PARALLEL_LANGUAGE_INPUT": _only(False),
}
"""Keys that are taken with the value that is built here."""

UNREAD = _unread_keys(
    {
        "AUGMENT": (
            "VERTICAL_FLIP_PROB_TRAIN BRIGHTNESS CONTRAST SATURATION HUE CROP_PROB CROP_MIN_IOUS "
            "CROP_MIN_SIZE"
        ),
        "DATALOADER": "MIN_KPS_PER_IMS USE_RANDOM_SEED DISTRIBUTE_CHUNK_AMONG_NODE",
        "DATASETS": (
            "CLASS_CONCAT SAMPLE_RATIO SHUFFLE_SEED PREDEFINED_TEXT BOX_THRESHOLD COCO_COPY "
            "LVIS_COPY FLICKR_COPY MIXED_COPY OBJECT365_COPY VG_COPY OI_COPY IN_COPY "
            "GENERAL_COPY GENERAL_COPY_TEST ADD_DET_PROMPT_ADVANCED USE_OD_AUG "
            "USE_COCO_FORMAT CONTROL_PROB PROMPT_VERSION PROMPT_LIMIT_NEG POS_QUESTION_PROB "
            "NEG_QUESTION_PROB FULL_QUESTION_PROB NO_MINUS_ONE_FOR_ONE_HOT DISABLE_CLIP_TO_IMAGE "
            "LVIS_USE_NORMAL_AP BING_INDEX_LIST "
            "CAPTION_MIN_BOX REPLACE_CLEAN_LABEL FURTHER_SCREEN CAPTION_CONF CAPTION_NMS "
            "PACK_RANDOM_CAPTION_NUMBER INFERENCE_CAPTION SAMPLE_NEGATIVE_FOR_GROUNDING_DATA "
            "RANDOM_PACK_PROB NO_RANDOM_PACK_PROBABILITY SAFEGUARD_POSITIVE_CAPTION "
            "CAPTION_FORMAT_VERSION LOCAL_DEBUG TRAIN_DATASETNAME_SUFFIX TEST_DATASETNAME_SUFFIX "
            "OVERRIDE_CATEGORY SUPRESS_QUERY CAPTION_PROMPT FLICKR_GT_TYPE DIVER_BOX_FOR_VQA"
        ),
        "GLIPKNOW": (
            "KNOWLEDGE_TYPE MAX_NUM_CLASSES_PER_BATCH_TRAIN LAN_FEATURE_AGG_TYPE GPT3_NUM "
            "WIKI_AND_GPT3"
        ),
        "MODEL": "BOX_ON DEBUG ONNX PRETRAIN_NAME",
        "MODEL.ATSS": (
            "NUM_CLASSES PRIOR_PROB NUM_CONVS CHANNELS USE_DFCONV USE_GN USE_BN USE_DYRELU "
            "USE_SE INFERENCE_TH_TRAIN PRE_NMS_TOP_N_TRAIN POST_NMS_TOP_N_TRAIN"
        ),
        "MODEL.BACKBONE": (
            "GROUP RESET_BN NORM_LEVEL USE_BN USE_SYNCBN USE_NSYNCBN USE_GN USE_EN USE_DFCONV "
            "USE_DYRELU USE_SE LAYER_SETUP OUT_FEATURES FPN_LAYER USE_CHECKPOINT "
            "EFFICIENT_DET_START_FROM EFFICIENT_DET_COMPOUND EFFICIENT_DET_BIFPN_VERSION"
        ),
        "MODEL.BIFPN": "NUM_REPEATS USE_ATTENTION",
        "MODEL.CLIP": "CONTEXT_LENGTH WIDTH LAYERS HEADS DROP_PATH TOKENIZER VOCAB_SIZE",
        "MODEL.DYHEAD": "NUM_CLASSES GROUPS TOPK SHALLOW_LOG_SCALE USE_CHECKPOINT",
        "MODEL.DYHEAD.FUSE_CONFIG": (
            "JOINT_EMB_SIZE JOINT_OUT_SIZE JOINT_EMB_DROPOUT JOINT_MLP_LAYERS TOKEN_LOSS_WEIGHT "
            "CONTRASTIVE_HIDDEN_DIM CONTRASTIVE_ALIGN_LOSS_WEIGHT "
            "DO_LANG_PROJ_OUTSIDE_CHECKPOINT "
            "MLM_LOSS_FOR_ONLY_POSITIVES NO_MASK_FOR_OD NO_MASK_FOR_GOLD MLM_LOSS_COEF "
            "MLM_OBJ_FOR_ONLY_POSITIVE SHALLOW_MAX_POSITIVE_ANCHORS USE_SHALLOW_ZERO_PADS "
            "SHALLOW_CONTRASTIVE_HIDDEN_DIM SHALLOW_CONTRASTIVE_LOSS_WEIGHT"
        ),
        "MODEL.EVO_NORM": "NUM_GROUPS EPSILON",
        "MODEL.FCOS": (
            "NUM_CLASSES FPN_STRIDES PRIOR_PROB INFERENCE_TH NMS_TH PRE_NMS_TOP_N NUM_CONVS "
            "USE_DFCONV CENTER_SAMPLING_RADIUS IOU_LOSS_TYPE NORM_REG_TARGETS CENTERNESS_ON_REG "
            "USE_GT_CENTER DETECTIONS_PER_IMG USE_GN USE_BN INFERENCE_TH_TRAIN "
            "PRE_NMS_TOP_N_TRAIN POST_NMS_TOP_N_TRAIN"
        ),
        "MODEL.FOCAL": (
            "BBOX_REG_WEIGHT BBOX_REG_BETA FG_IOU_THRESHOLD BG_IOU_THRESHOLD LOSS_ALPHA LOSS_GAMMA"
        ),
        "MODEL.LANGUAGE_BACKBONE": (
            "USE_CHECKPOINT LANG_DIM UNUSED_TOKEN RNN_TYPE VARIABLE_LENGTH WORD_EMBEDDING_SIZE "
            "WORD_VEC_SIZE HIDDEN_SIZE BIDIRECTIONAL INPUT_DROPOUT_P DROPOUT_P CORPUS_PATH "
            "VOCAB_SIZE"
        ),
        "MODEL.RESNETS": (
            "USE_STEM3X3 WITH_SE USE_AVG_DOWN NUM_GROUPS WIDTH_PER_GROUP STRIDE_IN_1X1 "
            "TRANS_FUNC STEM_FUNC RES5_DILATION BACKBONE_OUT_CHANNELS RES2_OUT_CHANNELS "
            "STEM_OUT_CHANNELS REVISION STAGE_WITH_DCN WITH_MODULATED_DCN DEFORMABLE_GROUPS"
        ),
        "MODEL.RETINANET": (
            "NUM_CLASSES NUM_CONVS PRE_NMS_TOP_N PRIOR_PROB INFERENCE_TH NMS_TH DETECTIONS_PER_IMG"
        ),
        "MODEL.ROI_BOX_HEAD": (
            "FEATURE_EXTRACTOR PREDICTOR POOLER_RESOLUTION POOLER_SAMPLING_RATIO POOLER_SCALES "
            "NUM_CLASSES MLP_HEAD_DIM USE_GN DILATION CONV_HEAD_DIM NUM_STACKED_CONVS "
            "POOLER_ALIGNED"
        ),
        "MODEL.ROI_HEADS": (
            "USE_FPN FG_IOU_THRESHOLD BG_IOU_THRESHOLD BBOX_REG_WEIGHTS BATCH_SIZE_PER_IMAGE "
            "POSITIVE_FRACTION SCORE_THRESH NMS DETECTIONS_PER_IMG"
        ),
        "MODEL.ROI_KEYPOINT_HEAD": (
            "FEATURE_EXTRACTOR PREDICTOR POOLER_RESOLUTION POOLER_SAMPLING_RATIO POOLER_SCALES "
            "MLP_HEAD_DIM CONV_LAYERS RESOLUTION NUM_CLASSES KEYPOINT_NAME "
            "SHARE_BOX_FEATURE_EXTRACTOR"
        ),
        "MODEL.ROI_MASK_HEAD": (
            "FEATURE_EXTRACTOR PREDICTOR POOLER_RESOLUTION POOLER_SAMPLING_RATIO POOLER_SCALES "
            "MLP_HEAD_DIM CONV_LAYERS RESOLUTION SHARE_BOX_FEATURE_EXTRACTOR POSTPROCESS_MASKS "
            "POSTPROCESS_MASKS_THRESHOLD DILATION USE_GN HG_SCALE"
        ),
        "MODEL.RPN": (
            "STRADDLE_THRESH OCTAVE FG_IOU_THRESHOLD BG_IOU_THRESHOLD BATCH_SIZE_PER_IMAGE "
            "POSITIVE_FRACTION PRE_NMS_TOP_N_TRAIN PRE_NMS_TOP_N_TEST POST_NMS_TOP_N_TRAIN "
            "POST_NMS_TOP_N_TEST NMS_THRESH MIN_SIZE FPN_POST_NMS_TOP_N_TRAIN "
            "FPN_POST_NMS_TOP_N_TEST RPN_HEAD"
        ),
        "MODEL.SWINT": "OUT_CHANNELS OUT_NORM LAYER_SCALE",
        "SEARCH": "MAX_EPOCH SELECT_NUM POPULATION_NUM MUTATION_NUM CROSSOVER_NUM MUTATION_PROB",
        "SOLVER": (
            "MULTI_MAX_ITER MOMENTUM MIN_LR STEP_PATIENCE TEST_WITH_INFERENCE MAX_NEG_PER_BATCH "
            "DISABLE_OUTPUT_DISTRIBUTED FIND_UNUSED_PARAMETERS DATASET_LENGTH "
            "WEIGHT_DECAY_SCHEDULE_RATIO"
        ),
        "TEST": (
            "EXPECTED_RESULTS EXPECTED_RESULTS_SIGMA_TOL IMS_PER_BATCH SCALES RANGES MAX_SIZE "
            "FLIP SPECIAL_NMS TH PRE_NMS_TOP_N NUM_CLASSES SELECT_CLASSES AFTER_TRAINING"
        ),
    }
)
"""Keys that nothing reads as long as those of FIXED have their values."""

CARD_KEYS: CardOptions = {
    **OPTIONS,
    **SETTINGS,
    **FIXED,
    **UNREAD,
    "TENSORBOARD_EXP": CardKey((), _unread),
    "PATHS_CATALOG": CardKey((), _unread),
}


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a model dictionary of mmdet 3 stands for, by path.

    Args:
        cfg: the ``model`` of a config with losses, as those for fine-tuning have them, or a
            config with it. Nothing but ``model`` is looked at.

    Raises:
        UserError: it describes a network that is not built here, or lacks a key.
    """
    model = cfg.get("model", cfg)
    if model.get("type") != "GLIP":
        raise UserError(
            "The config has neither MODEL, as microsoft/GLIP's, nor a model of type GLIP, as "
            "mmdet's: give one of GLIP."
        )
    head = _Section(model, "bbox_head")
    head.only(type="ATSSVLFusionHead")
    head.section("anchor_generator").only(
        ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32, 64, 128]
    )
    head.section("bbox_coder").only(target_stds=[0.1, 0.1, 0.2, 0.2])
    language = _Section(model, "language_model")
    settings = {
        "model.tower_blocks": head.get("num_dyhead_blocks", 6),
        "model.fusion": head.get("early_fuse", False),
        "model.bert": language["name"],
        "model.max_tokens": language.get("max_tokens", 256),
    }
    return settings | _trunk(model) | _pixels(model) | _losses(head, model) | _test(model)


class _Section:
    """A dictionary within a model; a key that is absent, or has a value not built here, is told."""

    def __init__(self, model: Mapping[str, Any], name: str) -> None:
        if not isinstance(model.get(name), Mapping):
            raise UserError(f"The model has no {name}: give one of GLIP, with losses.")
        self.name, self.content = name, model[name]

    def __getitem__(self, key: str) -> Any:
        if key not in self.content:
            raise UserError(f"The model's {self.name} has no {key}: add it.")
        return self.content[key]

    def get(self, key: str, default: Any) -> Any:
        """The value, or a default where it is absent or None."""
        value = self.content.get(key)
        return default if value is None else value

    def section(self, key: str) -> "_Section":
        """A dictionary in this one."""
        inner = _Section(self.content, key)
        inner.name = f"{self.name}.{key}"
        return inner

    def only(self, **built: Any) -> None:
        """Checks keys that are taken with one value, also by default."""
        for key, value in built.items():
            self.one_of(key, [value])

    def one_of(self, key: str, built: Iterable[Any]) -> Any:
        """The value, which must be one of those that are built here; the first is the default."""
        choices = list(built)
        found = _plain(self.get(key, choices[0]))
        if found not in choices:
            raise UserError(
                f"The model's {self.name}.{key} is {found!r}, but only "
                f"{' or '.join(map(repr, choices))} is built here."
            )
        return found


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _trunk(model: Mapping[str, Any]) -> dict[str, Any]:
    backbone, neck = _Section(model, "backbone"), _Section(model, "neck")
    backbone.only(
        type="SwinTransformer", mlp_ratio=4, qkv_bias=True, patch_norm=True, frozen_stages=-1
    )
    backbone.only(out_indices=[1, 2, 3], drop_rate=0.0, attn_drop_rate=0.0)
    kind = neck.one_of("type", ["FPN", "FPN_DropBlock"])
    neck.only(num_outs=5, add_extra_convs="on_output", relu_before_extra_convs=True)
    return {
        "model.swin_width": backbone["embed_dims"],
        "model.swin_depths": _plain(backbone["depths"]),
        "model.swin_heads": _plain(backbone["num_heads"]),
        "model.swin_window": backbone.get("window_size", 7),
        "model.drop_path": float(backbone.get("drop_path_rate", 0.1)),
        "model.drop_block": 0.0 if kind == "FPN" else 0.3,
        "model.channels": neck["out_channels"],
    }


def _pixels(model: Mapping[str, Any]) -> dict[str, Any]:
    pixels = _Section(model, "data_preprocessor")
    pixels.only(bgr_to_rgb=False)
    return {f"model.pixel_{key}": list(map(float, pixels[key])) for key in ("mean", "std")}


def _losses(head: _Section, model: Mapping[str, Any]) -> dict[str, Any]:
    tokens, boxes = head.section("loss_cls"), head.section("loss_bbox")
    tokens.only(type="FocalLoss", use_sigmoid=True, loss_weight=1.0)
    boxes.only(type="GIoULoss")
    head.section("loss_centerness").only(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0)
    assigner = _Section(model, "train_cfg").section("assigner")
    assigner.only(type="ATSSAssigner")
    assigner.section("iou_calculator").only(type="BboxOverlaps2D_GLIP")
    return {
        "loss.alpha": float(tokens.get("alpha", 0.25)),
        "loss.gamma": float(tokens.get("gamma", 2.0)),
        "loss.box_weight": float(boxes.get("loss_weight", 1.0)),
        "loss.candidates": assigner["topk"],
        "loss.no_object": False,
    }


def _test(model: Mapping[str, Any]) -> dict[str, Any]:
    test = _Section(model, "test_cfg")
    nms = test.section("nms")
    nms.only(type="nms")
    return {
        "test.score_thr": float(test["score_thr"]),
        "test.nms_pre": test["nms_pre"],
        "test.nms_thr": float(nms["iou_threshold"]),
        "test.max_per_img": test["max_per_img"],
        "test.rank_by": "score",
        "test.legacy_nms": False,
    }
