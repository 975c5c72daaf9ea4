"""RWR attention in a Keras model: learns to sort 64 numbers into above and below their mean."""

import keras
import numpy as np

from keras_rwr import RWRAttention

x = np.random.default_rng(0).normal(size=(256, 64, 1)).astype("float32")
y = (x > x.mean(axis=1, keepdims=True)).astype("float32")

inputs = keras.Input((64, 1))
hidden = keras.layers.Dense(32, activation="gelu")(inputs)
hidden += RWRAttention(num_heads=2, key_dim=16, window=8, topk=16)(hidden, hidden)
outputs = keras.layers.Dense(1, activation="sigmoid")(hidden)

model = keras.Model(inputs, outputs)
model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="binary_crossentropy")
losses = model.fit(x, y, epochs=5, batch_size=32, verbose=2).history["loss"]
print(f"{model.count_params()} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
