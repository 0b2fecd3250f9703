/* Stops every system call that changes files below a directory and asks what to do with it.

   A seccomp filter turns such calls into SIGSYS, whichever language or library makes them; the handler asks a
   function given by the test and carries the call out, refuses it, does half of it, or ends the process. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#define SYSCALL_RESULT(u) ((u)->uc_mcontext.gregs[REG_RAX])
static long argument(ucontext_t *u, int i) {
  static const int places[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};
  return u->uc_mcontext.gregs[places[i]];
}
__asm__(".text\n.global graft_raw\n.type graft_raw,@function\ngraft_raw:\n"
        "mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\nmov %r9,%r8\n"
        "mov 8(%rsp),%r9\nsyscall\n.global graft_after\ngraft_after:\nret\n");
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#define SYSCALL_RESULT(u) ((u)->uc_mcontext.regs[0])
static long argument(ucontext_t *u, int i) { return (long)u->uc_mcontext.regs[i]; }
__asm__(".text\n.global graft_raw\n.type graft_raw,%function\ngraft_raw:\n"
        "mov x8,x0\nmov x0,x1\nmov x1,x2\nmov x2,x3\nmov x3,x4\nmov x4,x5\nmov x5,x6\n"
        "svc #0\n.global graft_after\ngraft_after:\nret\n");
#else
#error "no entry for this processor"
#endif

extern long graft_raw(long, long, long, long, long, long, long);
extern char graft_after[];

enum { DO = 0, HALF = -1, HALF_AND_DIE = -2 }; /* or the errno of a refusal */
enum kind { PATH, AT, FD, WRITE, OPEN };

static const struct call {
  long number;
  const char *name;
  enum kind kind;
  int flags; /* of OPEN: which argument holds them */
} calls[] = {
#if defined(__x86_64__)
    {SYS_open, "open", PATH, 1},      {SYS_creat, "open", PATH, -1},  {SYS_rename, "rename", PATH, -1},
    {SYS_unlink, "unlink", PATH, -1}, {SYS_rmdir, "rmdir", PATH, -1}, {SYS_mkdir, "mkdir", PATH, -1},
    {SYS_chmod, "chmod", PATH, -1},   {SYS_link, "link", PATH, -1},
#endif
    {SYS_openat, "open", AT, 2},      {SYS_write, "write", WRITE, -1},    {SYS_pwrite64, "write", FD, -1},
    {SYS_writev, "writev", FD, -1},   {SYS_fsync, "fsync", FD, -1},       {SYS_fdatasync, "fsync", FD, -1},
    {SYS_ftruncate, "truncate", FD, -1}, {SYS_truncate, "truncate", PATH, -1},
#ifdef SYS_renameat
    {SYS_renameat, "rename", AT, -1},
#endif
    {SYS_renameat2, "rename", AT, -1}, {SYS_unlinkat, "unlink", AT, -1},  {SYS_mkdirat, "mkdir", AT, -1},
    {SYS_fchmodat, "chmod", AT, -1},   {SYS_fchmod, "chmod", FD, -1},     {SYS_linkat, "link", AT, -1},
    {SYS_symlinkat, "link", PATH, -1}, {SYS_fallocate, "fallocate", FD, -1},
    {SYS_copy_file_range, "copy", FD, -1}, {SYS_sendfile, "copy", FD, -1},
};
#define NUM_CALLS ((int)(sizeof calls / sizeof *calls))

static int (*ask)(const char *, const char *, long);
static char watched[PATH_MAX], former[PATH_MAX];
static size_t watched_length, former_length;
static __thread int busy;

/* From now on ask about calls below a directory; what they say of the one watched before is meant for this one. */
void graft_watch(const char *directory, int (*asked)(const char *, const char *, long)) {
  memcpy(former, watched, sizeof former);
  former_length = watched_length;
  strncpy(watched, directory, sizeof watched - 1);
  watched_length = strlen(watched);
  ask = asked;
}

static long moved(long path, char *out) {
  const char *text = (const char *)path;
  if (!former_length || strncmp(text, former, former_length)) return path;
  snprintf(out, PATH_MAX, "%s%s", watched, text + former_length);
  return (long)out;
}

static long raw(const struct call *c, const long *a) {
  return graft_raw(c->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* The full name of what a call acts on; the target of a link that names an open file. */
static int name_of(const struct call *c, const long *a, char *out) {
  char link[64], start[PATH_MAX];
  const char *path = c->kind == PATH ? (const char *)a[0] : c->kind == AT ? (const char *)a[1] : "";
  long directory = c->kind == PATH ? AT_FDCWD : (int)a[0];
  if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) > 0;
  if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%ld", directory);
  ssize_t n = readlink(link, start, sizeof start - 1);
  if (n < 0) return 0;
  start[n] = 0;
  return snprintf(out, PATH_MAX, path[0] ? "%s/%s" : "%s", start, path) > 0;
}

static void stopped(int number, siginfo_t *info, void *context) {
  (void)number;
  ucontext_t *u = context;
  char path[PATH_MAX];
  const struct call *c = NULL;
  int saved = errno;
  for (int i = 0; i < NUM_CALLS; i++)
    if (calls[i].number == info->si_syscall) c = &calls[i];
  if (!c) { SYSCALL_RESULT(u) = -ENOSYS; return; }
  long a[6], result;
  char first[PATH_MAX], second[PATH_MAX];
  for (int i = 0; i < 6; i++) a[i] = argument(u, i);
  int renames = !strcmp(c->name, "rename"), place = c->kind == AT;
  if (c->kind == PATH || c->kind == AT) a[place] = moved(a[place], first);
  if (renames) a[c->kind == AT ? 3 : 1] = moved(a[c->kind == AT ? 3 : 1], second);
  int wanted = DO;
  if (!busy && ask && watched_length && name_of(c, a, path) && !strncmp(path, watched, watched_length)) {
    busy = 1;
    wanted = ask(c->name, path, c->kind == WRITE ? a[2] : 0);
    busy = 0;
    /* The asked one may have moved to a copy of the directory in a child. */
    if (c->kind == PATH || c->kind == AT) a[place] = moved(a[place], first);
    if (renames) a[c->kind == AT ? 3 : 1] = moved(a[c->kind == AT ? 3 : 1], second);
  }
  if (c->kind == WRITE && (wanted == HALF || wanted == HALF_AND_DIE)) a[2] /= 2;
  result = wanted > 0 ? -wanted : raw(c, a);
  if (wanted == HALF_AND_DIE) kill(getpid(), SIGKILL);
  errno = saved;
  SYSCALL_RESULT(u) = result;
}

/* Put the filter in place, for this process and its children, for good; 0 or an errno. */
int graft_intercept(void) {
  struct sock_filter code[16 + 8 * NUM_CALLS];
  int n = 0;
  unsigned long after = (unsigned long)graft_after;
#define FIELD(name, more) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, name) + (more))
  code[n++] = (struct sock_filter)FIELD(arch, 0);
  code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
  code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  code[n++] = (struct sock_filter)FIELD(instruction_pointer, 0);
  code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)after, 0, 3);
  code[n++] = (struct sock_filter)FIELD(instruction_pointer, 4);
  code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(after >> 32), 0, 1);
  code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  for (int i = 0; i < NUM_CALLS; i++) {
    code[n++] = (struct sock_filter)FIELD(nr, 0);
    if (calls[i].flags < 0) {
      code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i].number, 0, 1);
    } else { /* opening to read changes nothing */
      code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i].number, 0, 3);
      code[n++] = (struct sock_filter)FIELD(args[calls[i].flags], 0);
      code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_WRONLY | O_RDWR | O_CREAT | O_TRUNC, 0, 1);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
  }
  code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog program = {(unsigned short)n, code};
  struct sigaction action = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_NODEFER};
  if (sigaction(SIGSYS, &action, NULL)) return errno;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}
