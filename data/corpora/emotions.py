"""The common set: each corpus keeps its own words in `label`, and `emotion` holds the word that corpora share.

The words are those of AffectNet's eight classes, which hold the six of CREMA-D and the seven of MELD and DFEW. What has
no counterpart among them has no `emotion`: calm, bored, frustrated, worried, anxious and other labels stay in `label`.
"""

COMMON = {
    "angry": ("angry", "anger"),
    "contempt": ("contempt",),
    "disgust": ("disgust", "disgusted"),
    "fearful": ("fearful", "fear"),
    # Excitement counts as happiness in the usual four classes of IEMOCAP, the only corpus here that tells them apart.
    "happy": ("happy", "happiness", "joy", "excited"),
    "neutral": ("neutral",),
    "sad": ("sad", "sadness"),
    "surprised": ("surprised", "surprise"),
}

TO_COMMON = {word: common for common, words in COMMON.items() for word in words}
