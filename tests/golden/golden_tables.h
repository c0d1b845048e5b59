/* golden_tables.h - the tables that need no model: noise, schedules, token ids. Tests of test_golden. */
#ifndef KILN_GOLDEN_TABLES_H
#define KILN_GOLDEN_TABLES_H

void golden_tables_noise(void **state);     /* every draw of noise/, bit for bit */
void golden_tables_schedule(void **state);  /* sigmas, mu, times of every size and number of steps of schedule/ */
void golden_tables_pocket(void **state);    /* every string of tokenizer/ with the vocabulary of models/pocket */
void golden_tables_qwen(void **state);      /* the same with the published vocabulary; skips when build/qwen is not there */

#endif
