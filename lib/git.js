'use strict'
/**
 * `sandbox.git`: E2B's convenience methods. Each is one or a few runs of the guest's git; nothing here knows more of
 * git than its command line and its porcelain output.
 */
const { CommandExitError, GitAuthError, GitUpstreamError, InvalidArgumentError } = require('./errors')

/** git must fail instead of asking: nobody sits at the terminal. */
const GIT_ENVS = { GIT_TERMINAL_PROMPT: '0' }

const RESET_MODES = ['soft', 'mixed', 'hard', 'merge', 'keep']
const CONFIG_SCOPES = ['global', 'local', 'system']

/** What git, its helpers and servers say when credentials are missing or refused. */
const AUTH_FAILURE =
  /authentication failed|terminal prompts disabled|could not read username|invalid username or password|access denied|permission denied|not authorized/i
/** What push and pull say when a branch has no counterpart on the remote. */
const NO_UPSTREAM =
  /no upstream branch|no upstream configured|no tracking information|set the remote as upstream|set the upstream branch|please specify which branch you want to merge with/i

/** A word of a shell command. */
function quote(word) {
  const text = String(word)
  return /^[A-Za-z0-9_@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`
}

/** A git command line; `path` is the repository. */
function gitCommand(args, path) {
  return ['git', ...(path ? ['-C', path] : []), ...args].map(quote).join(' ')
}

/** Whether a failed run's output matches. */
function failedWith(error, pattern) {
  return error instanceof CommandExitError && pattern.test(`${error.stderr}\n${error.stdout}`)
}

/** An http(s) URL in its parts; `undefined` for anything else, such as `git@host:path`. */
function httpUrl(url) {
  try {
    const parsed = new URL(url)
    return ['http:', 'https:'].includes(parsed.protocol) ? parsed : undefined
  } catch {
    return undefined
  }
}

function withCredentials(url, username, password) {
  if (!URL.canParse(url)) throw new InvalidArgumentError(`Invalid Git URL: ${url}`)
  const parsed = httpUrl(url)
  if (!parsed) throw new InvalidArgumentError('Only http(s) Git URLs support username/password credentials.')
  parsed.username = username
  parsed.password = password
  return parsed.toString()
}

function withoutCredentials(url) {
  const parsed = httpUrl(url)
  if (!parsed || (!parsed.username && !parsed.password)) return url
  parsed.username = ''
  parsed.password = ''
  return parsed.toString()
}

/** The directory into which git clones when none is named. */
function directoryOf(url) {
  if (!URL.canParse(url)) return undefined
  const last = new URL(url).pathname.split('/').filter(Boolean).at(-1)
  return last?.replace(/\.git$/, '') || undefined
}

/** What the two letters of `git status --porcelain` mean together; the first that applies. */
const STATUS_LABELS = [
  ['U', 'conflict'],
  ['R', 'renamed'],
  ['C', 'copied'],
  ['D', 'deleted'],
  ['A', 'added'],
  ['M', 'modified'],
  ['T', 'typechange'],
  ['?', 'untracked'],
]

/** The line `## branch...upstream [ahead 1, behind 2]`. */
function parseBranchLine(line) {
  const none = { currentBranch: undefined, upstream: undefined, ahead: 0, behind: 0, detached: false }
  if (!line?.startsWith('## ')) return none
  const [, heads, counts = ''] = /^## (.*?)(?: \[(.*)\])?$/.exec(line)
  const count = (word) => Number(new RegExp(`${word} (\\d+)`).exec(counts)?.[1] ?? 0)
  const tracking = { ahead: count('ahead'), behind: count('behind') }
  if (/^HEAD \(|detached/.test(heads)) return { ...none, ...tracking, detached: true }
  const [branch, upstream] = heads.replace(/^(No commits yet on|Initial commit on) /, '').split('...')
  return { ...none, ...tracking, currentBranch: branch || undefined, upstream: upstream || undefined }
}

function parseFileLine(line) {
  const [index, tree] = line
  const label = STATUS_LABELS.find(([letter]) => letter === index || letter === tree)?.[1] ?? 'unknown'
  const path = line.slice(3)
  const arrow = label === 'untracked' ? -1 : path.indexOf(' -> ')
  const entry = {
    name: arrow < 0 ? path : path.slice(arrow + 4),
    status: label,
    indexStatus: index,
    workingTreeStatus: tree,
    staged: index !== ' ' && index !== '?',
  }
  if (arrow >= 0) entry.renamedFrom = path.slice(0, arrow)
  return entry
}

/** The output of `git status --porcelain=1 -b`. */
function parseGitStatus(output) {
  const lines = output.split(/\r?\n/).filter((line) => line.trim() !== '')
  const fileStatus = lines
    .slice(1)
    .filter((line) => line.length > 3)
    .map(parseFileLine)
  const count = (test) => fileStatus.filter(test).length
  const totalCount = fileStatus.length
  const stagedCount = count(({ staged }) => staged)
  const untrackedCount = count(({ status }) => status === 'untracked')
  const conflictCount = count(({ status }) => status === 'conflict')
  return {
    ...parseBranchLine(lines[0]),
    fileStatus,
    isClean: totalCount === 0,
    hasChanges: totalCount > 0,
    hasStaged: stagedCount > 0,
    hasUntracked: untrackedCount > 0,
    hasConflicts: conflictCount > 0,
    totalCount,
    stagedCount,
    unstagedCount: totalCount - stagedCount,
    untrackedCount,
    conflictCount,
  }
}

/** The output of `git branch --format=%(refname:short)\t%(HEAD)`. */
function parseGitBranches(output) {
  const rows = output
    .split('\n')
    .map((line) => line.trim().split('\t'))
    .filter(([name]) => name !== '')
  return {
    branches: rows.map(([name]) => name),
    currentBranch: rows.find(([, head]) => head === '*')?.[0],
  }
}

/** A password alone cannot be used. */
function checkCredentials(action, { username, password }) {
  if (password && !username) {
    throw new InvalidArgumentError(`Username is required when using a password or token for git ${action}.`)
  }
}

/** Gives git's complaints about credentials and upstream branches their classes. */
function explain(error, action, { username, password }) {
  if (failedWith(error, AUTH_FAILURE)) {
    const needs = username && !password ? 'a password/token' : 'credentials'
    return new GitAuthError(`Git ${action} requires ${needs} for private repositories.`, { cause: error })
  }
  if (action !== 'clone' && failedWith(error, NO_UPSTREAM)) return noUpstream(action, error)
  return error
}

function noUpstream(action, cause) {
  const remedy =
    action === 'push'
      ? 'Set upstream once with { setUpstream: true } (and optional remote/branch), or pass remote and branch explicitly.'
      : 'Pass remote and branch explicitly, or set upstream once (push with { setUpstream: true } or run: git branch --set-upstream-to=origin/<branch> <branch>).'
  return new GitUpstreamError(
    `Git ${action} failed because no upstream branch is configured. ${remedy}`,
    cause && { cause },
  )
}

/** `sandbox.git` */
class Git {
  #commands

  /** @param {{ run(cmd: string, opts?: object): Promise<object> }} commands what runs the git commands */
  constructor(commands) {
    this.#commands = commands
  }

  async clone(url, opts = {}) {
    const { username, password, branch, depth, path, dangerouslyStoreCredentials, ...run } = opts
    checkCredentials('clone', opts)
    const source = username && password ? withCredentials(url, username, password) : url
    const clean = withoutCredentials(source)
    const forget = !dangerouslyStoreCredentials && clean !== source
    const target = forget ? (path ?? directoryOf(url)) : path
    if (forget && !target) {
      throw new InvalidArgumentError(
        'A destination path is required when using credentials without storing them.',
      )
    }
    const args = ['clone', source]
    if (branch) args.push('--branch', branch, '--single-branch')
    if (depth) args.push('--depth', depth)
    if (target) args.push(target)
    try {
      const result = await this.#git(args, undefined, run)
      if (forget) await this.#git(['remote', 'set-url', 'origin', clean], target, run)
      return result
    } catch (error) {
      throw explain(error, 'clone', opts)
    }
  }

  async init(path, opts = {}) {
    const { bare, initialBranch, ...run } = opts
    const args = ['init']
    if (initialBranch) args.push('--initial-branch', initialBranch)
    if (bare) args.push('--bare')
    return this.#git([...args, path], undefined, run)
  }

  async remoteAdd(path, name, url, opts = {}) {
    if (!name || !url) {
      throw new InvalidArgumentError('Both remote name and URL are required to add a git remote.')
    }
    const { fetch, overwrite, ...run } = opts
    const add = ['remote', 'add', ...(fetch ? ['-f'] : []), name, url]
    if (!overwrite) return this.#git(add, path, run)
    const either = `${gitCommand(add, path)} || ${gitCommand(['remote', 'set-url', name, url], path)}`
    return this.#shell(fetch ? `(${either}) && ${gitCommand(['fetch', name], path)}` : either, run)
  }

  async remoteGet(path, name, opts) {
    if (!name) throw new InvalidArgumentError('Remote name is required.')
    const { stdout } = await this.#shell(`${gitCommand(['remote', 'get-url', name], path)} || true`, opts)
    return stdout.trim() || undefined
  }

  async status(path, opts) {
    return parseGitStatus((await this.#git(['status', '--porcelain=1', '-b'], path, opts)).stdout)
  }

  async branches(path, opts) {
    const { stdout } = await this.#git(['branch', '--format=%(refname:short)\t%(HEAD)'], path, opts)
    return parseGitBranches(stdout)
  }

  async createBranch(path, branch, opts) {
    return this.#git(['checkout', '-b', branch], path, opts)
  }

  async checkoutBranch(path, branch, opts) {
    return this.#git(['checkout', branch], path, opts)
  }

  async deleteBranch(path, branch, opts = {}) {
    const { force, ...run } = opts
    return this.#git(['branch', force ? '-D' : '-d', branch], path, run)
  }

  async add(path, opts = {}) {
    const { files, all = true, ...run } = opts
    return this.#git(['add', ...(files?.length ? ['--', ...files] : [all ? '-A' : '.'])], path, run)
  }

  async commit(path, message, opts = {}) {
    const { authorName, authorEmail, allowEmpty, ...run } = opts
    const args = []
    if (authorName) args.push('-c', `user.name=${authorName}`)
    if (authorEmail) args.push('-c', `user.email=${authorEmail}`)
    args.push('commit', '-m', message)
    if (allowEmpty) args.push('--allow-empty')
    return this.#git(args, path, run)
  }

  async reset(path, opts = {}) {
    const { mode, target, paths, ...run } = opts
    if (mode && !RESET_MODES.includes(mode)) {
      throw new InvalidArgumentError(`Reset mode must be one of ${RESET_MODES.join(', ')}.`)
    }
    const args = ['reset']
    if (mode) args.push(`--${mode}`)
    if (target) args.push(target)
    if (paths?.length) args.push('--', ...paths)
    return this.#git(args, path, run)
  }

  async restore(path, opts) {
    const { paths, staged, worktree, source, ...run } = opts ?? {}
    if (!paths?.length) throw new InvalidArgumentError('At least one path is required.')
    // Without a word about either, the working tree; `staged` alone means the index alone.
    const tree = worktree ?? !staged
    if (!tree && !staged) throw new InvalidArgumentError('At least one of staged or worktree must be true.')
    const args = ['restore']
    if (tree) args.push('--worktree')
    if (staged) args.push('--staged')
    if (source) args.push('--source', source)
    return this.#git([...args, '--', ...paths], path, run)
  }

  async push(path, opts = {}) {
    const { remote, branch, setUpstream = true, username, password, ...run } = opts
    checkCredentials('push', opts)
    const push = (target) => {
      const args = ['push']
      if (setUpstream && target) args.push('--set-upstream')
      if (target) args.push(target)
      if (branch) args.push(branch)
      return this.#git(args, path, run)
    }
    try {
      if (username && password) {
        return await this.#authenticated(path, remote, username, password, run, push)
      }
      return await push(remote)
    } catch (error) {
      throw explain(error, 'push', opts)
    }
  }

  async pull(path, opts = {}) {
    const { remote, branch, username, password, ...run } = opts
    checkCredentials('pull', opts)
    if (!remote && !branch && !(await this.#hasUpstream(path, run))) throw noUpstream('pull')
    const pull = (target) => this.#git(['pull', ...[target, branch].filter(Boolean)], path, run)
    try {
      if (username && password) {
        return await this.#authenticated(path, remote, username, password, run, pull)
      }
      return await pull(remote)
    } catch (error) {
      throw explain(error, 'pull', opts)
    }
  }

  async setConfig(key, value, opts = {}) {
    const { flag, repository, run } = this.#configScope(key, opts)
    return this.#git(['config', flag, key, value], repository, run)
  }

  async getConfig(key, opts = {}) {
    const { flag, repository, run } = this.#configScope(key, opts)
    const command = gitCommand(['config', flag, '--get', key], repository)
    return (await this.#shell(`${command} || true`, run)).stdout.trim() || undefined
  }

  async configureUser(name, email, opts = {}) {
    if (!name || !email) throw new InvalidArgumentError('Both name and email are required.')
    await this.setConfig('user.name', name, opts)
    return this.setConfig('user.email', email, opts)
  }

  async dangerouslyAuthenticate(opts) {
    const { username, password, host = 'github.com', protocol = 'https', ...run } = opts ?? {}
    if (!username || !password) {
      throw new InvalidArgumentError('Both username and password are required to authenticate git.')
    }
    const credential = { protocol: protocol.trim(), host: host.trim(), username, password }
    const input = Object.entries(credential).map(([key, value]) => `${key}=${value}\n`)
    await this.#git(['config', '--global', 'credential.helper', 'store'], undefined, run)
    return this.#shell(`printf %s ${quote(`${input.join('')}\n`)} | git credential approve`, run)
  }

  #configScope(key, opts) {
    const { scope = 'global', path, ...run } = opts
    if (!key) throw new InvalidArgumentError('Git config key is required.')
    if (!CONFIG_SCOPES.includes(scope)) {
      throw new InvalidArgumentError(`Git config scope must be one of: ${CONFIG_SCOPES.join(', ')}.`)
    }
    if (scope === 'local' && !path) {
      throw new InvalidArgumentError('A repository path is required when using scope "local".')
    }
    return { flag: `--${scope}`, repository: scope === 'local' ? path : undefined, run }
  }

  async #hasUpstream(path, run) {
    try {
      const args = ['rev-parse', '--abbrev-ref', '--symbolic-full-name', '@{u}']
      return (await this.#git(args, path, run)).stdout.trim() !== ''
    } catch (error) {
      if (error instanceof CommandExitError) return false
      throw error
    }
  }

  /** Puts the credentials into the remote's URL for the time of one operation. */
  async #authenticated(path, wanted, username, password, run, operation) {
    const remote = wanted ?? (await this.#onlyRemote(path, run))
    const url = (await this.#git(['remote', 'get-url', remote], path, run)).stdout.trim()
    if (!url) throw new InvalidArgumentError(`Remote "${remote}" URL not found in repository.`)
    const setUrl = (to) => this.#git(['remote', 'set-url', remote, to], path, run)
    await setUrl(withCredentials(url, username, password))
    let result
    try {
      result = await operation(remote)
    } catch (error) {
      // The operation's failure says more than one of restoring the URL would.
      await setUrl(url).catch(() => {})
      throw error
    }
    await setUrl(url)
    return result
  }

  async #onlyRemote(path, run) {
    const { stdout } = await this.#git(['remote'], path, run)
    const remotes = stdout.split('\n').filter((name) => name.trim() !== '')
    if (remotes.length === 1) return remotes[0].trim()
    throw new InvalidArgumentError(
      'Remote is required when using username/password and the repository has multiple remotes.',
    )
  }

  async #git(args, path, opts) {
    return this.#shell(gitCommand(args, path), opts)
  }

  async #shell(cmd, opts = {}) {
    return this.#commands.run(cmd, { ...opts, envs: { ...GIT_ENVS, ...opts.envs } })
  }
}

module.exports = { Git, parseGitStatus, parseGitBranches, quote }
