/* What starts a frozen program: Python itself, linked into this executable, and the modules in a folder beside it.
 *
 * The folder is flannel-lib, or the executable's own; it holds the standard library, and the module entry_NAME
 * for an executable called NAME, whose import is the program.
 *
 * In the place of PyInstaller's own starter, which loads Python as a shared library: position-independent code
 * takes a quarter longer for everything, and the loading 10 ms of each start. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Where modules are, below the folder, in the order in which they are looked for. */
static const char *const places[] = {"/", "/python" PYTHON_VERSION "/lib-dynload"};

static char executable[PATH_MAX], folder[PATH_MAX + 32], entry[NAME_MAX + 8] = "entry_";

/* Find the executable, its folder and its module; 0 if that cannot be done. */
static int find(void)
{
	char marker[sizeof folder + 32], *name, *c;

	if (readlink("/proc/self/exe", executable, sizeof executable - 1) <= 0)
		return 0;
	name = strrchr(executable, '/') + 1;
	strcat(entry, name);
	for (c = entry; *c; c++)
		*c = *c == '-' ? '_' : *c;
	snprintf(folder, sizeof folder, "%.*sflannel-lib", (int)(name - executable), executable);
	snprintf(marker, sizeof marker, "%s/encodings", folder);
	if (access(marker, R_OK))
		folder[name - executable - 1] = 0; /* "" for the root directory, as each place begins with a slash */
	return 1;
}

/* Python apart from all that is installed or set on this machine. */
static PyStatus start(int argc, char **argv)
{
	PyPreConfig before;
	PyConfig config;
	PyStatus status;
	size_t i;

	PyPreConfig_InitIsolatedConfig(&before);
	before.utf8_mode = 1; /* whatever the locale, which container runtimes leave unset */
	status = Py_PreInitialize(&before);
	if (PyStatus_Exception(status))
		return status;
	PyConfig_InitIsolatedConfig(&config);
	config.site_import = 0;
	config.write_bytecode = 0;
	config.install_signal_handlers = 1;
	config.parse_argv = 0;
	config.module_search_paths_set = 1;
	status = PyConfig_SetBytesArgv(&config, argc, argv);
	if (!PyStatus_Exception(status))
		status = PyConfig_SetBytesString(&config, &config.executable, executable);
	for (i = 0; i < sizeof places / sizeof *places && !PyStatus_Exception(status); i++) {
		char path[sizeof folder + 64];
		wchar_t *wide;

		snprintf(path, sizeof path, "%s%s", folder, places[i]);
		wide = Py_DecodeLocale(path, NULL);
		status = wide ? PyWideStringList_Append(&config.module_search_paths, wide) : PyStatus_NoMemory();
		PyMem_RawFree(wide);
	}
	if (!PyStatus_Exception(status))
		status = Py_InitializeFromConfig(&config);
	PyConfig_Clear(&config);
	return status;
}

int main(int argc, char **argv)
{
	PyStatus status;

	if (!find()) {
		perror("/proc/self/exe");
		return 1;
	}
	status = start(argc, argv);
	if (PyStatus_Exception(status))
		Py_ExitStatusException(status);
	if (!PyImport_ImportModule(entry)) {
		PyErr_Print(); /* ends the process here on sys.exit() */
		Py_FinalizeEx();
		return 1;
	}
	return Py_FinalizeEx() ? 120 : 0;
}
