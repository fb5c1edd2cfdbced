'use strict'
const { CommandExitError, Git, GitAuthError, GitUpstreamError, InvalidArgumentError } = require('..')
const { parseGitBranches, parseGitStatus } = require('../lib/git')
const { ownStore, failure, failures, until } = require('./support')

const store = ownStore()
const AUTHOR = { authorName: 'A U Thor', authorEmail: 'author@example.com' }
let sandbox
let git

beforeAll(async () => {
  sandbox = await store.create()
  git = sandbox.git
})

test('a repository from init to history', async () => {
  const repo = '/tmp/first repo'
  await git.init(repo, { initialBranch: 'main' })
  await sandbox.files.write(`${repo}/it's.txt`, 'one\n')
  const before = await git.status(repo)
  expect(before).toMatchObject({
    currentBranch: 'main',
    isClean: false,
    hasUntracked: true,
    untrackedCount: 1,
  })
  await git.add(repo)
  expect(await git.status(repo)).toMatchObject({ hasStaged: true, stagedCount: 1, totalCount: 1 })
  await git.commit(repo, 'it\'s $HOME "quoted"', AUTHOR)
  expect(await git.status(repo)).toMatchObject({ isClean: true, ahead: 0, behind: 0, detached: false })
  const log = await sandbox.commands.run('git log -1 --format="%an|%ae|%s"', { cwd: repo })
  expect(log.stdout).toBe('A U Thor|author@example.com|it\'s $HOME "quoted"\n')

  await git.createBranch(repo, 'side')
  expect(await git.branches(repo)).toEqual({ branches: ['main', 'side'], currentBranch: 'side' })
  await git.checkoutBranch(repo, 'main')
  await git.deleteBranch(repo, 'side')
  expect(await failure(git.deleteBranch(repo, 'side'))).toBeInstanceOf(CommandExitError)

  await sandbox.files.write(`${repo}/it's.txt`, 'two\n')
  await git.add(repo, { files: ["it's.txt"] })
  await git.restore(repo, { paths: ['.'], staged: true })
  expect(await git.status(repo)).toMatchObject({ hasStaged: false, hasChanges: true })
  await git.restore(repo, { paths: ["it's.txt"] })
  expect(await git.status(repo)).toMatchObject({ isClean: true })
  await git.commit(repo, 'empty', { ...AUTHOR, allowEmpty: true })
  await git.reset(repo, { mode: 'hard', target: 'HEAD~1' })
  const count = await sandbox.commands.run('git rev-list --count HEAD', { cwd: repo })
  expect(count.stdout).toBe('1\n')
})

test('remotes: clone, push, pull, upstream branches', async () => {
  const [repo, remote, clone] = ['/tmp/r/work', '/tmp/r/remote.git', '/tmp/r/clone']
  await git.init(remote, { bare: true, initialBranch: 'main' })
  await git.init(repo, { initialBranch: 'main' })
  await git.commit(repo, 'first', { ...AUTHOR, allowEmpty: true })
  expect(await git.remoteGet(repo, 'origin')).toBeUndefined()
  await git.remoteAdd(repo, 'origin', '/nowhere')
  await git.remoteAdd(repo, 'origin', remote, { overwrite: true, fetch: true })
  expect(await git.remoteGet(repo, 'origin')).toBe(remote)
  const lonely = await failure(git.push(repo, { setUpstream: false }))
  expect(lonely).toBeInstanceOf(GitUpstreamError)
  expect(lonely.message).toMatch(/no upstream branch is configured/)
  expect(await failure(git.pull(repo))).toBeInstanceOf(GitUpstreamError)
  await git.push(repo, { remote: 'origin', branch: 'main' })
  await git.clone(remote, { path: clone, branch: 'main', depth: 1 })
  await git.commit(repo, 'second', { ...AUTHOR, allowEmpty: true })
  expect(await git.status(repo)).toMatchObject({ upstream: 'origin/main', ahead: 1 })
  await git.push(repo)
  await git.pull(clone)
  expect((await sandbox.commands.run('git log -1 --format=%s', { cwd: clone })).stdout).toBe('second\n')
})

test('a server that wants credentials, and credentials that stay out of the clone', async () => {
  const server = await sandbox.commands.run(
    `python3 -u -c "
import http.server, base64
class H(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        want = 'Basic ' + base64.b64encode(b'me:secret').decode()
        if self.headers.get('Authorization') != want:
            self.send_response(401); self.send_header('WWW-Authenticate', 'Basic'); self.end_headers(); return
        super().do_GET()
print('ready'); http.server.HTTPServer(('127.0.0.1', 8418), H).serve_forever()"`,
    { background: true, cwd: '/tmp', timeoutMs: 0 },
  )
  await until(() => server.stdout.includes('ready'))
  await git.init('/tmp/http.git', { bare: true, initialBranch: 'main' })
  await git.init('/tmp/seed', { initialBranch: 'main' })
  await git.commit('/tmp/seed', 'seed', { ...AUTHOR, allowEmpty: true })
  await git.remoteAdd('/tmp/seed', 'origin', '/tmp/http.git')
  await git.push('/tmp/seed', { remote: 'origin', branch: 'main' })
  await sandbox.commands.run('git update-server-info', { cwd: '/tmp/http.git' })
  const url = 'http://127.0.0.1:8418/http.git'
  const refused = await failure(git.clone(url, { path: '/tmp/no' }))
  expect(refused).toBeInstanceOf(GitAuthError)
  expect(await failure(git.clone(url, { path: '/tmp/no', username: 'me' }))).toMatchObject({
    message: expect.stringContaining('password/token'),
  })
  await git.clone(url, { path: '/tmp/yes', username: 'me', password: 'secret' })
  expect(await git.remoteGet('/tmp/yes', 'origin')).toBe(url)
  await git.pull('/tmp/yes', { username: 'me', password: 'secret', branch: 'main' })
  expect(await git.remoteGet('/tmp/yes', 'origin')).toBe(url)
  await server.kill()
})

test('configuration', async () => {
  await git.configureUser('Me', 'me@example.com')
  expect(await git.getConfig('user.name')).toBe('Me')
  await git.init('/tmp/conf')
  await git.setConfig('pull.rebase', 'true', { scope: 'local', path: '/tmp/conf' })
  expect(await git.getConfig('pull.rebase', { scope: 'local', path: '/tmp/conf' })).toBe('true')
  expect(await git.getConfig('pull.rebase')).toBeUndefined()
  await git.dangerouslyAuthenticate({ username: 'u', password: "p'w", host: 'example.com' })
  expect(await git.getConfig('credential.helper')).toBe('store')
  expect(await sandbox.files.read('.git-credentials')).toBe('https://u:p%27w@example.com\n')
})

test('wrong arguments are refused before anything runs', async () => {
  const idle = new Git({
    run: async () => {
      throw new Error('must not run')
    },
  })
  const calls = [
    idle.clone('https://x/y', { password: 'p' }),
    idle.clone('git@x:y', { username: 'u', password: 'p' }),
    idle.clone('not a url', { username: 'u', password: 'p' }),
    idle.remoteAdd('/r', '', 'u'),
    idle.remoteAdd('/r', 'n', ''),
    idle.remoteGet('/r', ''),
    idle.reset('/r', { mode: 'odd' }),
    idle.restore('/r', { paths: [] }),
    idle.restore('/r', { paths: ['a'], staged: false, worktree: false }),
    idle.push('/r', { password: 'p' }),
    idle.pull('/r', { password: 'p' }),
    idle.setConfig('', 'v'),
    idle.setConfig('k', 'v', { scope: 'odd' }),
    idle.getConfig('k', { scope: 'local' }),
    idle.configureUser('', 'e'),
    idle.dangerouslyAuthenticate({ username: 'u' }),
  ]
  for (const error of await failures(calls)) expect(error).toBeInstanceOf(InvalidArgumentError)
})

test('the porcelain formats', () => {
  const status = parseGitStatus(
    '## main...origin/main [ahead 2, behind 3]\nR  old -> new\n M changed\nUU both\n?? a -> b\n',
  )
  expect(status).toMatchObject({ currentBranch: 'main', upstream: 'origin/main', ahead: 2, behind: 3 })
  expect(status.fileStatus).toEqual([
    {
      name: 'new',
      renamedFrom: 'old',
      status: 'renamed',
      indexStatus: 'R',
      workingTreeStatus: ' ',
      staged: true,
    },
    { name: 'changed', status: 'modified', indexStatus: ' ', workingTreeStatus: 'M', staged: false },
    { name: 'both', status: 'conflict', indexStatus: 'U', workingTreeStatus: 'U', staged: true },
    { name: 'a -> b', status: 'untracked', indexStatus: '?', workingTreeStatus: '?', staged: false },
  ])
  expect(status).toMatchObject({ totalCount: 4, stagedCount: 2, unstagedCount: 2, hasConflicts: true })
  expect(parseGitStatus('## No commits yet on main\n')).toMatchObject({
    currentBranch: 'main',
    isClean: true,
  })
  expect(parseGitStatus('## HEAD (no branch)\n')).toMatchObject({ detached: true, currentBranch: undefined })
  expect(parseGitStatus('')).toMatchObject({ isClean: true, currentBranch: undefined })
  expect(parseGitBranches('main\t*\nside\t \n')).toEqual({
    branches: ['main', 'side'],
    currentBranch: 'main',
  })
})
