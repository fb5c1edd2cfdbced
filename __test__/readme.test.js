'use strict'
/** The examples of README.md, each run as a program of its own, with the package's name leading to this clone. */
const { mkdtempSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } = require('node:fs')
const { execFile } = require('node:child_process')
const os = require('node:os')
const path = require('node:path')
const { ROOT } = require('./support')

const examples = [...readFileSync(path.join(ROOT, 'README.md'), 'utf8').matchAll(/```ts\n(.*?)```/gs)].map(
  ([, code]) => code,
)

let directory

beforeAll(() => {
  directory = mkdtempSync(path.join(os.tmpdir(), 'amberbox-readme-'))
  mkdirSync(path.join(directory, 'node_modules'))
  symlinkSync(ROOT, path.join(directory, 'node_modules', 'amberbox'))
})

afterAll(() => rmSync(directory, { recursive: true, force: true }))

/** What each example prints, in order of appearance. */
const PRINTS = [
  /^ready\n+\[[^]*snapshotId: '[^']+'[^]*\]\n$/,
  /^(?=.*^create done$)(?=.*^1$)(?=.*^3$)(?=.*^0 main$)/ms,
]

test('each example is expected to print something', () => expect(examples).toHaveLength(PRINTS.length))

test.each(examples.map((code, i) => [i + 1, code]))('example %i', async (number, code) => {
  const file = path.join(directory, `example-${number}.mjs`)
  writeFileSync(file, code)
  const env = { ...process.env, AMBERBOX_HOME: path.join(directory, 'home') }
  const output = await new Promise((done) =>
    execFile(process.execPath, [file], { cwd: directory, env }, (error, stdout, stderr) =>
      done({ code: error?.code ?? 0, stdout, stderr }),
    ),
  )
  expect(output).toEqual({ code: 0, stdout: expect.stringMatching(PRINTS[number - 1]), stderr: '' })
})
