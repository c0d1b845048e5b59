/* token_check.h - asks the model's own tokenizer whether prompts fit, before a night is spent on them.
 *
 * The tokenizer is the engine's, and the command line does not link the engine: `kiln-worker tokenize --model DIR
 * --count` runs beside us, one JSON string a line in, one number a line out. A text that cannot be too long is not
 * sent: every token covers at least one byte of the normalised text, which has at most three times the bytes of
 * the text itself (just as many when it is plain ASCII), and the chat template adds fewer than 32. */
#ifndef KILN_TOKEN_CHECK_H
#define KILN_TOKEN_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TOKEN_CHECK_MAX 512 /* tokens of a prompt, chat template included */

struct token_check;

/* token_check_open starts nothing yet: the program runs from the first text that must be counted. */
bool token_check_open(struct token_check **ret, const char *tool, const char *model_dir, char *why, size_t why_bytes);
/* token_check_add hands over a text of line `line`; `what` ("prompt") is borrowed. False: a text before it was too long, or the
 * tokenizer failed; why says which, and names the line as "LINE: ..." when ret_line is set (else *ret_line is 0). */
bool token_check_add(struct token_check *c, int64_t line, const char *what, const char *text, int64_t *ret_line, char *why,
                     size_t why_bytes);
bool token_check_finish(struct token_check *c, int64_t *ret_line, char *why, size_t why_bytes); /* all texts counted */
void token_check_close(struct token_check *c);

bool token_check_may_be_long(const char *text);

#endif
