'use strict'
/** A Jest reporter for a slow machine whose log is all there is: one line when a test begins, one when it ends. */
const path = require('node:path')

const seconds = (ms) => `${((ms ?? 0) / 1000).toFixed(1)} s`

module.exports = class LineReporter {
  #failed = []

  onTestFileStart({ path: file }) {
    console.log(`${path.basename(file)}`)
  }

  onTestCaseStart(_test, { fullName }) {
    console.log(`  ... ${fullName}`)
  }

  onTestCaseResult({ path: file }, { status, fullName, duration, failureMessages }) {
    if (status !== 'passed' && status !== 'failed') return
    console.log(`  ${status === 'passed' ? 'ok  ' : 'FAIL'} ${fullName} (${seconds(duration)})`)
    for (const message of failureMessages) console.log(message)
    if (status === 'failed') this.#failed.push(`${path.basename(file)}: ${fullName}`)
  }

  onTestFileResult({ path: file }, { testExecError, perfStats }) {
    if (testExecError) {
      console.log(`${path.basename(file)} could not run: ${testExecError.stack ?? testExecError.message}`)
      this.#failed.push(path.basename(file))
    }
    console.log(`${path.basename(file)}: ${seconds(perfStats.runtime)}`)
  }

  onRunComplete(_contexts, { numPassedTests, numFailedTests }) {
    console.log(`${numPassedTests} passed, ${numFailedTests} failed`)
    for (const name of this.#failed) console.log(`FAILED ${name}`)
  }

  getLastError() {}
}
