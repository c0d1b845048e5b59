-- submit_copy.sql - the columns in the order submit sends them.
copy submit_row (row, variation, width, height, steps, guidance, seed, truncate, content_key, model, file, name, prompt,
                 negative, labels, inputs, layout, loras) from stdin (format binary);
