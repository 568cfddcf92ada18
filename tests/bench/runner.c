/* Starts CNI plugins as a container runtime does, many pods at once, and says how long each one took.
 *
 * Usage: runner SOCKET, in the network namespace of the node; connects to the unix socket and then serves
 * batches until it is closed. Numbers are native, of 32 bits where nothing else is said.
 *
 *   batch:  number of jobs; for each job its number of steps; for each step `splice`, then the lengths of
 *           four texts, then the texts: path, environment (NUL after each K=V), head and tail
 *   answer: for each step, in the same order: wait status (-1: not started, as the step before it failed),
 *           lengths of stdout and stderr, 0, two moments of 64 bits (CLOCK_MONOTONIC, nanoseconds; before the
 *           start, after the end), and both texts
 *
 * All jobs begin at once; a job's steps follow one another. The stdin of a step is head, the stdout of step
 * number `splice` of its job (-1: nothing), and tail.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATH, ENVIRONMENT, HEAD, TAIL, TEXTS };
enum { PIPE_BYTES = 1 << 20 };

struct text {
	char *bytes;
	uint32_t length;
};

struct step {
	struct text given[TEXTS], output, diagnostics;
	int32_t splice;
	pid_t pid;
	int status, output_end, diagnostics_file, last;
	uint64_t began, ended;
};

static uint64_t now(void)
{
	struct timespec moment;

	clock_gettime(CLOCK_MONOTONIC, &moment);
	return (uint64_t)moment.tv_sec * 1000000000u + (uint64_t)moment.tv_nsec;
}

static void *allocated(size_t size)
{
	void *memory = calloc(1, size + 1);

	if (!memory)
		err(1, "%zu bytes", size);
	return memory;
}

static void take(FILE *from, void *into, size_t size)
{
	if (size && fread(into, size, 1, from) != 1)
		errx(1, "the batch ends early");
}

static struct text slurp(int descriptor)
{
	struct text text = {allocated(PIPE_BYTES), 0};
	ssize_t got;

	while ((got = read(descriptor, text.bytes + text.length, PIPE_BYTES - text.length)) > 0)
		text.length += (uint32_t)got;
	if (got < 0)
		err(1, "read what a plugin wrote");
	close(descriptor);
	return text;
}

static void feed(int descriptor, const struct text *text)
{
	if (text->length && write(descriptor, text->bytes, text->length) != (ssize_t)text->length)
		err(1, "%u bytes of stdin do not fit into a pipe", text->length);
}

/* Start a step of the job that begins at `job`. Its stdout goes to a pipe that is read once it has ended. */
static void start(const struct step *job, struct step *step)
{
	char *arguments[] = {step->given[PATH].bytes, NULL}, **environment, *variable;
	char *environment_end = step->given[ENVIRONMENT].bytes + step->given[ENVIRONMENT].length;
	posix_spawn_file_actions_t actions;
	int in[2], out[2], failed;
	size_t count = 0;

	environment = allocated(sizeof(*environment) * (step->given[ENVIRONMENT].length + 1));
	for (variable = step->given[ENVIRONMENT].bytes; variable < environment_end; variable += strlen(variable) + 1)
		environment[count++] = variable;
	step->diagnostics_file = memfd_create("stderr", MFD_CLOEXEC);
	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || step->diagnostics_file < 0)
		err(1, "pipes");
	if (fcntl(in[1], F_SETPIPE_SZ, PIPE_BYTES) < 0 || fcntl(in[1], F_SETFL, O_NONBLOCK) ||
	    fcntl(out[0], F_SETPIPE_SZ, PIPE_BYTES) < 0)
		err(1, "size of a pipe");
	feed(in[1], &step->given[HEAD]);
	if (step->splice >= 0)
		feed(in[1], &job[step->splice].output);
	feed(in[1], &step->given[TAIL]);
	close(in[1]);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, in[0], 0);
	posix_spawn_file_actions_adddup2(&actions, out[1], 1);
	posix_spawn_file_actions_adddup2(&actions, step->diagnostics_file, 2);
	step->began = now();
	failed = posix_spawn(&step->pid, arguments[0], &actions, NULL, arguments, environment);
	if (failed)
		errx(1, "%s: %s", arguments[0], strerror(failed));
	posix_spawn_file_actions_destroy(&actions);
	close(in[0]);
	close(out[1]);
	step->output_end = out[0];
	free(environment);
}

/* Wait for the end of a process, if `flags` let it, and start what follows it; 0 if none has ended. */
static int reap(struct step *steps, const uint32_t *first_of, uint32_t count, uint32_t *running, int flags)
{
	int status;
	pid_t pid = waitpid(-1, &status, flags);
	uint64_t moment = now();
	uint32_t i;

	if (pid < 0 && errno != ECHILD)
		err(1, "waitpid");
	if (pid <= 0)
		return 0;
	for (i = 0; i < count && steps[i].pid != pid; i++)
		;
	if (i == count)
		errx(1, "a process %d ended that was not started", (int)pid);
	steps[i].pid = 0;
	steps[i].ended = moment;
	steps[i].status = status;
	steps[i].output = slurp(steps[i].output_end);
	lseek(steps[i].diagnostics_file, 0, SEEK_SET);
	steps[i].diagnostics = slurp(steps[i].diagnostics_file);
	if (steps[i].last || status)
		--*running;
	else
		start(steps + first_of[i], steps + i + 1);
	return 1;
}

static struct step *read_steps(FILE *from, uint32_t jobs, uint32_t **first_of, uint32_t *count)
{
	struct step *steps = NULL;
	uint32_t job, length, i, first;
	int text;

	*first_of = NULL;
	*count = 0;
	for (job = 0; job < jobs; job++) {
		take(from, &length, sizeof(length));
		first = *count;
		*count += length;
		steps = realloc(steps, sizeof(*steps) * *count);
		*first_of = realloc(*first_of, sizeof(**first_of) * *count);
		if (!steps || !*first_of)
			err(1, "%u steps", *count);
		for (i = first; i < *count; i++) {
			memset(&steps[i], 0, sizeof(steps[i]));
			steps[i].status = -1;
			steps[i].last = i + 1 == *count;
			(*first_of)[i] = first;
			take(from, &steps[i].splice, sizeof(steps[i].splice));
			for (text = 0; text < TEXTS; text++)
				take(from, &steps[i].given[text].length, sizeof(uint32_t));
			for (text = 0; text < TEXTS; text++) {
				steps[i].given[text].bytes = allocated(steps[i].given[text].length);
				take(from, steps[i].given[text].bytes, steps[i].given[text].length);
			}
		}
	}
	return steps;
}

static void answer(FILE *to, struct step *step)
{
	uint32_t head[] = {(uint32_t)step->status, step->output.length, step->diagnostics.length, 0};
	uint64_t moments[] = {step->began, step->ended};
	int text;

	fwrite(head, sizeof(head), 1, to);
	fwrite(moments, sizeof(moments), 1, to);
	fwrite(step->output.bytes, 1, step->output.length, to);
	fwrite(step->diagnostics.bytes, 1, step->diagnostics.length, to);
	for (text = 0; text < TEXTS; text++)
		free(step->given[text].bytes);
	free(step->output.bytes);
	free(step->diagnostics.bytes);
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	uint32_t jobs, count, running, i, *first_of;
	int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct step *steps;
	FILE *from, *to;

	if (argc != 2 || strlen(argv[1]) >= sizeof(address.sun_path))
		errx(2, "usage: runner SOCKET");
	strcpy(address.sun_path, argv[1]);
	if (connect(connection, (struct sockaddr *)&address, sizeof(address)))
		err(1, "%s", argv[1]);
	from = fdopen(connection, "r");
	to = fdopen(fcntl(connection, F_DUPFD_CLOEXEC, 0), "w");
	if (!from || !to)
		err(1, "streams");
	while (fread(&jobs, sizeof(jobs), 1, from) == 1) {
		steps = read_steps(from, jobs, &first_of, &count);
		for (i = 0, running = 0; i < count; i++) {
			if (first_of[i] != i)
				continue;
			running++;
			start(steps + i, steps + i);
			while (reap(steps, first_of, count, &running, WNOHANG))
				;
		}
		while (running)
			reap(steps, first_of, count, &running, 0);
		for (i = 0; i < count; i++)
			answer(to, &steps[i]);
		if (fflush(to))
			err(1, "answer");
		free(steps);
		free(first_of);
	}
	return 0;
}
