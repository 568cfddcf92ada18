/* The CNI plugin as a runtime executes it: hands the call to flanneld and prints what comes back. If flanneld
 * has not taken the call, flannel-lib/flannel beside this file carries it out: the cold path. On the socket:
 *
 *   flanneld: struct hello                         (version 1; a stream, the machine's byte order)
 *   shim:     struct request with the descriptors, plugin's name, CNI_* variables with their NULs, stdin
 *   flanneld: struct reply, text for stdout, text for stderr
 *
 * flanneld does nothing until it has the whole request, so that up to then the cold path is safe. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/netlink.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum { CONNECT_MS = 2000, HELLO_MS = 5000, ANSWER_MS = 60000, LONGEST_MS = 24 * 3600 * 1000 };
/* A request behind its header; one send; each text of a reply; the cold path's stdin (it takes 16 MiB). */
enum { BODY_BYTES = 4 << 20, CHUNK_BYTES = 1 << 15, TEXT_BYTES = 64 << 20, SPOOL_BYTES = 64 << 20 };
enum { NSFS = 0x6e736673, PROCFS = 0x9fa0, DECLINED = 1 };
/* Descriptors by bit of fd_mask. A directory /proc/sys/net would not do: the kernel looks up what is in it in
 * the namespace of whoever asks. What is below its ipv4 and ipv6 belongs to where these were opened. */
enum { OWN, ROOT, NETNS, ROUTE, PACKET, IPV4, IPV6, DESCRIPTORS };

struct hello { char magic[4]; uint16_t version, zero; };
struct request {
	struct { char magic[4]; uint32_t fd_mask; int32_t netns_error; /* -1: a file that is no namespace */
		 uint32_t name_len, env_len, stdin_len, deadline_ms, zero; } head;
	char body[BODY_BYTES + 1]; /* one more, to notice that there is more */
};
struct reply { char magic[4]; uint32_t kind, exit_code, stdout_len, stderr_len; };

static struct request request;
static size_t body_len;
static int stdin_goes_on, timeout_ms, descriptors[DESCRIPTORS] = {-1, -1, -1, -1, -1, -1, -1};
static const char *command, *socket_path, *reason = "stdin is a terminal"; /* why flanneld did not do it */

static int64_t now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000) + t.tv_nsec / 1000000;
}

/* Have the next operation of a socket end with EAGAIN at the deadline; 0 and EAGAIN if that is over. */
static int limit(int fd, int option, int64_t deadline) {
	int64_t left = deadline - now_ms();
	struct timeval time = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};
	errno = EAGAIN;
	return left > 0 && setsockopt(fd, SOL_SOCKET, option, &time, sizeof time) == 0;
}

/* Write it all; 0 if nobody takes it. */
static int output(int fd, const char *bytes, size_t len) {
	while (len) {
		ssize_t n = write(fd, bytes, len);
		if (n >= 0)
			bytes += n, len -= (size_t)n;
		else if (errno != EAGAIN)
			return 0;
		else
			poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
	}
	return 1;
}

/* Print CNI error 11, try again later, as Go's plugins do, and exit. What is not ASCII becomes U+FFFD. */
static _Noreturn void fail(const char *format, ...) {
	static char message[8192], json[6 * sizeof message + 64];
	char *end = stpcpy(json, "{\n    \"code\": 11,\n    \"msg\": \"");
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(message, sizeof message, format, arguments);
	for (const char *c = message; *c; c++) {
		int plain = *c >= ' ' && *c <= '~' && *c != '"' && *c != '\\';
		end += sprintf(end, plain ? "%c" : "\\u%04x", *c > 0 ? *c : 0xfffd);
	}
	end = stpcpy(end, "\"\n}");
	signal(SIGPIPE, SIG_IGN);
	output(1, json, (size_t)(end - json));
	_exit(1);
}

static ssize_t read_stdin(char *bytes, size_t size) {
	ssize_t n;
	while ((n = read(0, bytes, size)) < 0 && errno == EAGAIN)
		poll(&(struct pollfd){.fd = 0, .events = POLLIN}, 1, -1);
	return n;
}

/* Put what was read of stdin, and what is still to come, into a file that becomes stdin; 0 if it cannot. */
static int spool(void) {
	ssize_t n = request.head.stdin_len;
	char *bytes = request.body + body_len - n;
	int file = memfd_create("stdin", MFD_CLOEXEC);
	for (size_t total = 0; n > 0; bytes = request.body) {
		if (!output(file, bytes, (size_t)n))
			return 0;
		total += (size_t)n;
		n = stdin_goes_on && total < SPOOL_BYTES ? read_stdin(request.body, BODY_BYTES) : 0;
	}
	return n == 0 && lseek(file, 0, SEEK_SET) == 0 && dup2(file, 0) == 0;
}

/* Become the plugin that needs no flanneld. */
static _Noreturn void cold(char *name, int undo) {
	static const char *const labels[] = {"own", "root", "netns", "route", "packet", "ipv4", "ipv6"};
	char path[4096 + 32] = "/", handed[256], *end = handed;
	if (readlink("/proc/self/exe", path, 4096) > 0)
		strcpy(strrchr(path, '/') + 1, "flannel-lib/flannel");
	for (int i = 0; i < DESCRIPTORS; i++)
		if (descriptors[i] >= 0)
			end += sprintf(end, "%s=%d ", labels[i], descriptors[i]);
	sprintf(end, "error=%d", request.head.netns_error);
	if (!setenv("FLANNEL_CNI_PLUGIN", name, 1) && !setenv("FLANNEL_CNI_FDS", handed, 1) &&
	    !(undo ? setenv("FLANNEL_CNI_UNDO", "1", 1) : unsetenv("FLANNEL_CNI_UNDO")) &&
	    (request.head.stdin_len == 0 || spool()))
		execve(path, (char *[]){name, NULL}, environ);
	fail("cannot start %s: %s; flanneld at %.200s did not serve the call: %s", path, strerror(errno),
	     socket_path, reason);
}

/* A connection to flanneld, which must be root; or -1. */
static int dial(void) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct ucred peer;
	socklen_t len = sizeof peer;
	if (*socket_path == 0 || strlen(socket_path) >= sizeof address.sun_path)
		return reason = *socket_path ? "its name is too long" : "it is switched off", -1;
	strcpy(address.sun_path, socket_path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int patience_ms = timeout_ms < CONNECT_MS ? timeout_ms : CONNECT_MS;
	if (fd < 0 || !limit(fd, SO_SNDTIMEO, now_ms() + patience_ms) ||
	    connect(fd, (struct sockaddr *)&address, sizeof address) ||
	    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len))
		return reason = strerror(errno), -1;
	return peer.uid == 0 ? fd : (reason = "it is not root's", -1);
}

/* Open what needs privilege in the container's namespace, all (but for IPv6) or nothing; 0, errno or -1. */
static int open_netns(const char *path) {
	struct statfs kind;
	int error = 0, fd = descriptors[NETNS] = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
	if (fd >= 0 && fstatfs(fd, &kind) == 0 && kind.f_type != NSFS && kind.f_type != PROCFS) {
		error = -1;
	} else if (fd < 0 || setns(fd, CLONE_NEWNET)) {
		error = errno;
	} else {
		if ((descriptors[ROUTE] = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)) < 0 ||
		    (descriptors[PACKET] = socket(AF_PACKET, SOCK_RAW, 0)) < 0 ||
		    (descriptors[IPV4] = open("/proc/sys/net/ipv4", O_PATH | O_DIRECTORY)) < 0)
			error = errno;
		descriptors[IPV6] = open("/proc/sys/net/ipv6", O_PATH | O_DIRECTORY);
		if (setns(descriptors[OWN], CLONE_NEWNET))
			fail("cannot return from %s: %s", path, strerror(errno));
	}
	for (int i = NETNS; error && i < DESCRIPTORS; descriptors[i++] = -1)
		if (descriptors[i] >= 0)
			close(descriptors[i]);
	return error;
}

/* Collect name, variables and stdin; 0 if that is not for flanneld. */
static int collect(const char *name) {
	request.head.name_len = (uint32_t)(body_len = strnlen(name, NAME_MAX));
	memcpy(request.body, name, body_len);
	for (char **one = environ; *one; one++) {
		size_t len = strncmp(*one, "CNI_", 4) ? 0 : strlen(*one) + 1;
		if (len > BODY_BYTES - body_len)
			return reason = "the environment is too long", 0;
		memcpy(request.body + body_len, *one, len);
		body_len += len, request.head.env_len += (uint32_t)len;
	}
	stdin_goes_on = *command && strcmp(command, "VERSION");
	while (stdin_goes_on) {
		ssize_t n = read_stdin(request.body + body_len, sizeof request.body - body_len);
		if (n < 0)
			return reason = "stdin cannot be read", 0;
		body_len += (size_t)n, request.head.stdin_len += (uint32_t)n;
		if (body_len > BODY_BYTES)
			return reason = "stdin is too long", 0;
		stdin_goes_on = n > 0;
	}
	return 1;
}

/* Send the request with its descriptors; 0 if flanneld did not get all of it. */
static int submit(int fd, int64_t deadline) {
	union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof descriptors)]; } control = {0};
	struct iovec part = {.iov_base = &request};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control};
	size_t len = 0, left = sizeof request.head + body_len;
	for (int i = 0; i < DESCRIPTORS; i++)
		if (descriptors[i] >= 0) {
			memcpy(CMSG_DATA(&control.head) + len, &descriptors[i], sizeof(int));
			request.head.fd_mask |= 1u << i, len += sizeof(int);
		}
	control.head = (struct cmsghdr){CMSG_LEN(len), SOL_SOCKET, SCM_RIGHTS};
	message.msg_controllen = CMSG_SPACE(len);
	while (left) {
		/* The kernel begins to wait anew with each buffer that it fills. */
		part.iov_len = left < CHUNK_BYTES ? left : CHUNK_BYTES;
		ssize_t n = limit(fd, SO_SNDTIMEO, deadline) ? sendmsg(fd, &message, MSG_NOSIGNAL) : -1;
		if (n < 0 && errno != EINTR)
			return reason = strerror(errno), 0;
		if (n < 0)
			continue;
		part.iov_base = (char *)part.iov_base + n, left -= (size_t)n;
		message.msg_controllen = 0;
	}
	return 1;
}

/* 0 if there is not all of it: EAGAIN at the deadline, else why not. */
static int receive(int fd, void *bytes, size_t len, int64_t deadline) {
	for (char *at = bytes; len;) {
		ssize_t n = limit(fd, SO_RCVTIMEO, deadline) ? recv(fd, at, len, 0) : -1;
		if (n > 0)
			at += n, len -= (size_t)n;
		else if (n == 0 ? (errno = ECONNRESET) : errno != EINTR)
			return 0;
	}
	return 1;
}

/* Have flanneld do it, and exit with its answer. If it did not: whether it may have done a part. */
static int ask(int fd) {
	static char small[1 << 16];
	struct hello hello;
	struct reply reply;
	char *texts = small;
	if (!receive(fd, &hello, sizeof hello, now_ms() + (timeout_ms < HELLO_MS ? timeout_ms : HELLO_MS)))
		return reason = errno == EAGAIN ? "it does not say hello" : strerror(errno), 0;
	if (memcmp(hello.magic, "FCNI", 4) || hello.version != 1)
		return reason = "it speaks another protocol", 0;
	int64_t deadline = now_ms() + timeout_ms;
	if (!submit(fd, deadline))
		return 0;
	int good = receive(fd, &reply, sizeof reply, deadline);
	if (good && (memcmp(reply.magic, "FCNI", 4) || reply.kind > DECLINED || reply.exit_code > 255 ||
		     reply.stdout_len > TEXT_BYTES || reply.stderr_len > TEXT_BYTES))
		good = 0, errno = EPROTO;
	if (good && reply.kind == DECLINED)
		return reason = "it declined", 0;
	size_t size = good ? (size_t)reply.stdout_len + reply.stderr_len : 0;
	if (size > sizeof small)
		texts = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	good = good && texts != MAP_FAILED && receive(fd, texts, size, deadline);
	if (!good && errno == EAGAIN)
		fail("flanneld at %.200s did not answer within %d ms", socket_path, timeout_ms);
	if (!good)
		return reason = strerror(errno), 1;
	signal(SIGPIPE, SIG_IGN);
	output(2, texts + reply.stdout_len, reply.stderr_len);
	_exit(output(1, texts, reply.stdout_len) || reply.exit_code ? (int)reply.exit_code : 1);
}

int main(int argc, char **argv) {
	char *rest, *path = argc > 0 ? argv[0] : "", *slash = strrchr(path, '/');
	char *name = slash ? slash + 1 : path, *netns = getenv("CNI_NETNS");
	long ms = strtol(getenv("FLANNEL_CNI_TIMEOUT_MS") ?: "", &rest, 10);
	timeout_ms = ms > 0 && ms <= LONGEST_MS && *rest == 0 ? (int)ms : ANSWER_MS;
	command = getenv("CNI_COMMAND") ?: "";
	socket_path = getenv("FLANNEL_CNI_SOCKET") ?: "/run/flannel/cni.sock";
	name = *name ? name : "flannel";
	/* A closed stdin, stdout or stderr must not lend its number to what is opened here. */
	while ((descriptors[OWN] = open("/proc/self/ns/net", O_RDONLY)) >= 0 && descriptors[OWN] <= 2 &&
	       close(descriptors[OWN]) == 0 && open("/dev/null", O_RDWR) >= 0)
		continue;
	if (descriptors[OWN] <= 2 || (descriptors[ROOT] = open("/", O_PATH | O_DIRECTORY)) < 0)
		fail("cannot open /dev/null, / and /proc/self/ns/net: %s", strerror(errno));
	int fd = isatty(0) ? -1 : dial(), undo = 0;
	memcpy(request.head.magic, "FCNI", 4);
	request.head.netns_error = netns && *netns ? open_netns(netns) : 0;
	request.head.deadline_ms = (uint32_t)timeout_ms;
	if (fd >= 0 && collect(name))
		undo = ask(fd) && strcmp(command, "ADD") == 0;
	cold(name, undo);
}
