"""What the options of `bitnet bench` may be, written out, so that help need not import the engine; a test compares them."""

SHAPE_NAMES = ("bitnet-2b-4t", "bonsai-1.7b", "bonsai-8b", "llama3-8b", "article-12x512")  # bitnet.shapes.SHAPES
SHAPE_ALIASES = {"2b-4t": "bitnet-2b-4t"}
MODEL_WEIGHTS = ("stored", "f16", "int8", "int4", "fp4", "binary", "ternary")  # bitnet.weights.WEIGHTS
SHAPE_WEIGHTS = ("f16", "bf16", "int8", "int4", "fp4", "binary", "ternary")  # bitnet.shapes.WEIGHTS
MODEL_HEADS = ("stored", "int8", "int4")  # bitnet.weights.HEADS
SHAPE_HEADS = ("f16", "int8", "int4", "ternary")  # bitnet.shapes.HEADS
CODEC_NAMES = ("auto", "t2", "b3")  # bitnet.engine.CODECS
