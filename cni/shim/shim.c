/* The CNI plugin as a runtime executes it: hands the call to flanneld (the protocol: flanneld/cniwire.py) and
 * prints what comes back. What flanneld did not take, flannel-lib/flannel beside this does: the cold path.
 * flanneld does nothing until it has the whole request and has said hello, so that up to then that is safe. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
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
#include <sys/time.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum { CONNECT_MS = 2000, HELLO_MS = 5000, ANSWER_MS = 60000, LONGEST_MS = 24 * 3600 * 1000 };
/* A request behind its header; of stdin, more than the cold path takes; one send; a text of a reply. */
enum { BODY_BYTES = 4 << 20, STDIN_BYTES = 17 << 20, CHUNK_BYTES = 1 << 15, TEXT_BYTES = 64 << 20 };
enum { NSFS = 0x6e736673, PROCFS = 0x9fa0, DECLINED = 1, NETLINK_ROUTE = 0, VERSION = 3 };
/* By bit of fd_mask. What /proc/sys/net leads to depends on who looks, what is below ipv6/conf not. */
enum { OWN, ROOT, NETNS, ROUTE, SETTINGS, DESCRIPTORS };

static struct {
	struct { char magic[4]; uint32_t fd_mask; int32_t netns_error; /* -1: a file that is no namespace */
		 uint32_t name_len, env_len, stdin_len, deadline_ms, version; } head;
	char body[BODY_BYTES + STDIN_BYTES];
} request;
static size_t body_len;
static int timeout_ms, descriptors[DESCRIPTORS] = {-1, -1, -1, -1, -1};
static int64_t deadline_ms; /* of what is done with the socket now */
static const char *command, *socket_path, *reason = "stdin is a terminal"; /* why flanneld did not do it */

static int64_t now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000) + t.tv_nsec / 1000000;
}

/* Have the next operation of a socket end with EAGAIN at the deadline; 0 and EAGAIN if that is over. */
static int limit(int fd, int option) {
	int64_t left = deadline_ms - now_ms();
	struct timeval time = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};
	return left > 0 ? setsockopt(fd, SOL_SOCKET, option, &time, sizeof time) == 0 : (errno = EAGAIN, 0);
}

/* Wait if it would have blocked; 0 if it failed for another reason. */
static int may_go_on(int fd, short events) {
	return errno == EAGAIN && poll(&(struct pollfd){.fd = fd, .events = events}, 1, -1) > 0;
}

/* Write it all; 0 if nobody takes it. */
static int output(int fd, const char *bytes, size_t len) {
	for (ssize_t n; len; bytes += n, len -= (size_t)n)
		while ((n = write(fd, bytes, len)) < 0)
			if (!may_go_on(fd, POLLOUT))
				return 0;
	return 1;
}

/* Print CNI error 11, try again later, as Go's plugins do, and exit. What is not ASCII becomes U+FFFD. */
static _Noreturn void fail(const char *format, ...) {
	static char message[8192], json[6 * sizeof message + 64];
	char *end = stpcpy(json, "{\n    \"code\": 11,\n    \"msg\": \"");
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(message, sizeof message, format, arguments);
	for (const char *c = message; *c; c++)
		end += sprintf(end, *c < ' ' || *c > '~' || strchr("\"\\", *c) ? "\\u%04x" : "%c",
			       *c & 0x80 ? 0xfffd : *c);
	signal(SIGPIPE, SIG_IGN);
	output(1, json, (size_t)(stpcpy(end, "\"\n}") - json));
	_exit(1);
}

/* Become the plugin that needs no flanneld; what was read of stdin becomes a file. */
static _Noreturn void cold(char *name, int undo) {
	static const char *const labels[] = {"own", "root", "netns", "route", "settings"};
	size_t len = request.head.stdin_len;
	char path[4096 + 32] = "/", handed[256], *end = handed;
	if (readlink("/proc/self/exe", path, 4096) > 0)
		strcpy(strrchr(path, '/') + 1, "flannel-lib/flannel");
	for (int i = 0; i < DESCRIPTORS; i++)
		if (descriptors[i] >= 0)
			end += sprintf(end, "%s=%d ", labels[i], descriptors[i]);
	sprintf(end, "error=%d", request.head.netns_error);
	int file = len > 0 ? memfd_create("stdin", MFD_CLOEXEC) : 0;
	if (!setenv("FLANNEL_CNI_PLUGIN", name, 1) && !setenv("FLANNEL_CNI_FDS", handed, 1) &&
	    !(undo ? setenv("FLANNEL_CNI_UNDO", "1", 1) : unsetenv("FLANNEL_CNI_UNDO")) &&
	    output(file, request.body + body_len - len, len) &&
	    (len == 0 || (lseek(file, 0, SEEK_SET) == 0 && dup2(file, 0) == 0)))
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
	deadline_ms = now_ms() + (timeout_ms < CONNECT_MS ? timeout_ms : CONNECT_MS);
	if (fd < 0 || !limit(fd, SO_SNDTIMEO) || connect(fd, (struct sockaddr *)&address, sizeof address) ||
	    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len))
		return reason = strerror(errno), -1;
	return peer.uid == 0 ? fd : (reason = "it is not root's", -1);
}

/* Open what needs privilege in the container's namespace, all (but for SETTINGS) or nothing; 0, errno or -1. */
static int open_netns(const char *path) {
	struct statfs kind;
	int error = 0, fd = descriptors[NETNS] = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
	if (fd >= 0 && fstatfs(fd, &kind) == 0 && kind.f_type != NSFS && kind.f_type != PROCFS) {
		error = -1;
	} else if (fd < 0 || setns(fd, CLONE_NEWNET)) {
		error = errno;
	} else {
		if ((descriptors[ROUTE] = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)) < 0)
			error = errno;
		/* Not there where the kernel has no IPv6. */
		descriptors[SETTINGS] = open("/proc/sys/net/ipv6/conf", O_PATH | O_DIRECTORY);
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
	int has_stdin = *command && strcmp(command, "VERSION");
	ssize_t n;
	request.head.name_len = (uint32_t)(body_len = strlen(strcpy(request.body, name)));
	for (char **one = environ; *one; one++) {
		size_t len = strncmp(*one, "CNI_", 4) ? 0 : strlen(*one) + 1;
		if (len > BODY_BYTES - body_len)
			return reason = "the environment is too long", 0;
		memcpy(request.body + body_len, *one, len);
		body_len += len, request.head.env_len += (uint32_t)len;
	}
	while (has_stdin && (n = read(0, request.body + body_len, sizeof request.body - body_len)) != 0)
		if (n > 0)
			body_len += (size_t)n, request.head.stdin_len += (uint32_t)n;
		else if (!may_go_on(0, POLLIN))
			return reason = "stdin cannot be read", 0;
	return body_len <= BODY_BYTES || (reason = "stdin is too long", 0);
}

/* Send or receive all of a message's only part; 0 if it fails: with EAGAIN at the deadline. */
static int transfer(int fd, int option, struct msghdr *msg, size_t len) {
	for (char *at = msg->msg_iov->iov_base; len;) {
		ssize_t n = -1;
		/* The kernel begins to wait anew with each buffer that it fills. */
		*msg->msg_iov = (struct iovec){at, len < CHUNK_BYTES ? len : CHUNK_BYTES};
		if (limit(fd, option))
			n = option == SO_SNDTIMEO ? sendmsg(fd, msg, MSG_NOSIGNAL) : recvmsg(fd, msg, 0);
		if (n > 0)
			at += n, len -= (size_t)n, msg->msg_controllen = 0;
		else if (n == 0 ? (errno = ECONNRESET) : errno != EINTR)
			return 0;
	}
	return 1;
}

static int receive(int fd, void *bytes, size_t len) {
	struct iovec part = {.iov_base = bytes};
	return transfer(fd, SO_RCVTIMEO, &(struct msghdr){.msg_iov = &part, .msg_iovlen = 1}, len);
}

/* Send the request with its descriptors; 0 if flanneld did not get all of it. */
static int submit(int fd) {
	union { struct cmsghdr head; char bytes[CMSG_SPACE(sizeof descriptors)]; } control = {0};
	struct iovec part = {.iov_base = &request};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control};
	size_t len = 0;
	for (int i = 0; i < DESCRIPTORS; i++)
		if (descriptors[i] >= 0) {
			memcpy(CMSG_DATA(&control.head) + len, &descriptors[i], sizeof(int));
			request.head.fd_mask |= 1u << i, len += sizeof(int);
		}
	control.head.cmsg_len = CMSG_LEN(len), control.head.cmsg_level = SOL_SOCKET, control.head.cmsg_type = SCM_RIGHTS;
	message.msg_controllen = CMSG_SPACE(len);
	return transfer(fd, SO_SNDTIMEO, &message, sizeof request.head + body_len);
}

/* Have flanneld do it, and exit with its answer. If it did not: whether it may have done a part. */
static int ask(int fd) {
	struct { char magic[4]; uint16_t version, zero; } hello;
	struct { char magic[4]; uint32_t kind, exit_code, stdout_len, stderr_len; } reply;
	deadline_ms = now_ms() + (timeout_ms < HELLO_MS ? timeout_ms : HELLO_MS);
	if (!submit(fd))
		return reason = strerror(errno), 0;
	if (!receive(fd, &hello, sizeof hello)) {
		reason = errno == EAGAIN ? "it does not say hello" : strerror(errno);
		/* From here on it cannot say so, and begins nothing then; unless it just has. */
		return shutdown(fd, SHUT_RDWR) == 0 && recv(fd, &hello, sizeof hello, MSG_DONTWAIT) > 0
			? (fail("flanneld at %.200s said hello too late", socket_path), 0) : 0;
	}
	if (memcmp(hello.magic, "FCNI", 4) || hello.version != VERSION)
		return reason = "it speaks another protocol", 0;
	deadline_ms = now_ms() + timeout_ms;
	int good = receive(fd, &reply, sizeof reply);
	if (good && (memcmp(reply.magic, "FCNI", 4) || reply.kind > DECLINED || reply.exit_code > 255 ||
		     reply.stdout_len > TEXT_BYTES || reply.stderr_len > TEXT_BYTES))
		good = 0, errno = EPROTO;
	if (good && reply.kind == DECLINED)
		return reason = "it declined", 0;
	size_t size = good ? (size_t)reply.stdout_len + reply.stderr_len : 0;
	char *texts = mmap(NULL, size + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	good = good && texts != MAP_FAILED && receive(fd, texts, size);
	if (!good && errno == EAGAIN)
		fail("flanneld at %.200s did not answer within %d ms", socket_path, timeout_ms);
	if (!good)
		return reason = strerror(errno), 1;
	signal(SIGPIPE, SIG_IGN), output(2, texts + reply.stdout_len, reply.stderr_len);
	_exit(output(1, texts, reply.stdout_len) || reply.exit_code ? (int)reply.exit_code : 1);
}

int main(void) {
	char *rest, *name = program_invocation_short_name, *netns = getenv("CNI_NETNS");
	long ms = strtol(getenv("FLANNEL_CNI_TIMEOUT_MS") ?: "", &rest, 10);
	timeout_ms = ms > 0 && ms <= LONGEST_MS && *rest == 0 ? (int)ms : ANSWER_MS;
	command = getenv("CNI_COMMAND") ?: "", name = *name ? name : "flannel";
	socket_path = getenv("FLANNEL_CNI_SOCKET") ?: "/run/flannel/cni.sock";
	/* A closed stdin, stdout or stderr must not lend its number to what is opened here. */
	while ((descriptors[OWN] = open("/proc/self/ns/net", O_RDONLY)) >= 0 && descriptors[OWN] <= 2 &&
	       close(descriptors[OWN]) == 0 && open("/dev/null", O_RDWR) >= 0)
		continue;
	if (descriptors[OWN] <= 2 || (descriptors[ROOT] = open("/", O_PATH | O_DIRECTORY)) < 0)
		fail("cannot open /dev/null, / and /proc/self/ns/net: %s", strerror(errno));
	memcpy(request.head.magic, "FCNI", 4);
	request.head.netns_error = netns && *netns ? open_netns(netns) : 0;
	request.head.deadline_ms = (uint32_t)timeout_ms, request.head.version = VERSION;
	int fd = isatty(0) ? -1 : dial(); /* last, as flanneld wakes up and waits for the rest */
	/* Of what may have been done, only an ADD must not be done again. */
	cold(name, fd >= 0 && collect(name) && ask(fd) && strcmp(command, "ADD") == 0);
}
