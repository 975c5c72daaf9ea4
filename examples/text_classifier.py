"""RWR attention in an ordinary Keras model: a text classifier with padding.

Made-up reviews of 24 to 64 words, padded with zeros. Each ends with good or with bad words, and
opens with two words that say whether it is meant as it stands or ironically, which turns it round.
Opening and ending are further apart than the attention's window, and neither alone tells anything
about the class: without the walk, no better than a coin.
"""

import keras
import numpy as np

from keras_rwr import RWRAttention

SINCERE, IRONIC, GOOD, BAD, FILLER, VOCABULARY = 1, 2, 3, 4, 5, 40
SHORTEST, LONGEST = 24, 64


def make_texts(count, seed):
    """Word numbers `(count, 64)`, zeros behind the words, and classes `(count,)`, 1 is good."""
    rng = np.random.default_rng(seed)
    texts = np.zeros((count, LONGEST), "int32")
    ironic, bad = rng.integers(0, 2, (2, count))
    for text, opening, ending in zip(texts, SINCERE + ironic, GOOD + bad, strict=True):
        words = rng.integers(SHORTEST, LONGEST + 1)
        text[:words] = rng.integers(FILLER, VOCABULARY, words)
        text[rng.choice(words // 3, 2, replace=False)] = opening
        text[words - 1 - rng.choice(words // 3, 4, replace=False)] = ending
    return texts, (ironic == bad).astype("float32")


def make_model(mask_zero=True, lens_strength=1.0):
    """The classifier, compiled."""
    words = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 32, mask_zero=mask_zero)(words)
    attended = RWRAttention(
        num_heads=2,
        key_dim=16,
        window=4,
        topk=8,
        neighbor_block=1,
        steps=2,
        edge_weight="exponential",
        lens_strength=lens_strength,
    )(x, x)
    x = keras.layers.Add()([x, attended])
    x = keras.layers.LayerNormalization()(x)
    hidden = keras.layers.Dense(64, activation="gelu")(x)
    x = keras.layers.Add()([x, keras.layers.Dense(32)(hidden)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras.Model(words, outputs)

    model.compile(
        optimizer=keras.optimizers.Adam(1e-2), loss="binary_crossentropy", metrics=["accuracy"]
    )
    return model


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    model = make_model()
    model.fit(*make_texts(1024, seed=0), epochs=4, batch_size=16, verbose=2)
    texts, classes = make_texts(512, seed=1)
    predicted = model.predict(texts, verbose=0)[:, 0]
    accuracy = np.mean((predicted > 0.5) == (classes > 0.5))
    larger_class = max(classes.mean(), 1 - classes.mean())
    print(f"accuracy {accuracy:.3f}, share of the larger class {larger_class:.3f}")

    model.save("text_classifier.keras")
    loaded = keras.saving.load_model("text_classifier.keras")
    difference = np.abs(loaded.predict(texts, verbose=0)[:, 0] - predicted).max()
    print(f"saved and loaded, predictions differ by {difference:.1e}")
